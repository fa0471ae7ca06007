"""Two runs never share a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xdlm_megatron.checkpoint.reader import CheckpointError
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.train.lock import locked_run

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_and_free_once_the_other_is_killed(mesh: Mesh, tmp_path: Path) -> None:
    folder = tmp_path / "runs/one"
    with locked_run(folder, mesh):
        assert (folder / "lock").exists()
        (folder / "outcome").write_text("requeue at step 1\n")
    command = [sys.executable, "-c", HOLDER, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=r"one is in use by another run; stop that one"):
            locked_run(folder, mesh).__enter__()
        assert (folder / "outcome").exists(), "it is the other's"
        holder.kill()
    with locked_run(folder, mesh):
        assert not (folder / "outcome").exists()
