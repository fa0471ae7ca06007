"""The launcher of these tests: it must end what it starts, and show what went wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.launch import launch, started

pytestmark = pytest.mark.distributed

PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
print("rank", rank, "of", os.environ["WORLD_SIZE"], *sys.argv[1:], flush=True)
{rest}
"""


def program(folder: Path, rest: str) -> Path:
    path = folder / "program.py"
    path.write_text(PROGRAM.format(rest=rest))
    return path


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a killed process may take a moment."""
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left


def test_ranks_run_the_program_with_its_arguments(tmp_path: Path) -> None:
    output = launch(3, "verb", tmp_path / "r.yaml", ["a=b"], program(tmp_path, "sys.exit(7)"), status=7)
    recipe = tmp_path / "r.yaml"
    assert sorted(output.splitlines()) == [f"rank {rank} of 3 verb {recipe} a=b" for rank in range(3)]


def test_one_that_fails_ends_the_others_and_its_words_are_shown(tmp_path: Path) -> None:
    path = program(tmp_path, "if rank == 1: raise ValueError('what went wrong')\ntime.sleep(100)")
    with pytest.raises(AssertionError, match=r"\[-15, 1\](?s:.*)what went wrong"):
        launch(2, "verb", tmp_path, program=path)


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    with started(2, "verb", tmp_path, program=program(tmp_path, "time.sleep(100)")) as job:
        job.wait_until(lambda: job.output().count("\n") == 2)
        job.signal(signal.SIGKILL, [0])
        assert job.wait() == [-signal.SIGKILL, -signal.SIGTERM]


def test_nothing_is_left_when_time_runs_out(tmp_path: Path) -> None:
    """Not even a process that does not listen, or has stopped."""
    path = program(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(100)")
    with started(2, "verb", tmp_path, program=path) as job:
        job.wait_until(lambda: job.output().count("\n") == 2)
        job.signal(signal.SIGSTOP, [1])
        with pytest.raises(AssertionError, match=r"no codes in 0.1 s:(?s:.*)rank 0 of 2"):
            job.wait(0.1)
        assert all(Path(f"/proc/{pid}").exists() for pid in job.pids)
    assert alive(job.pids) == []


def test_ranks_have_sessions_of_their_own(tmp_path: Path) -> None:
    with started(2, "verb", tmp_path, program=program(tmp_path, "time.sleep(100)")) as job:
        job.wait_until(lambda: job.output().count("\n") == 2)
        assert [os.getsid(pid) for pid in job.pids] == job.pids
    assert alive(job.pids) == []
