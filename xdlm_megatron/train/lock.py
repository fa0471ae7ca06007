"""One process group at a time trains into a run folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from xdlm_megatron.checkpoint.reader import CheckpointError
from xdlm_megatron.parallel.mesh import Mesh


@contextmanager
def locked_run(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Makes the run's folder and holds the lock in it inside the block; the lock goes with the process.

    A file system without locks (some network ones) is used without.

    Raises:
        CheckpointError: another run holds it; on every process.
    """
    with ExitStack() as stack:
        taken = False
        if mesh.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            taken = not _try_lock(stack.enter_context((folder / "lock").open("w")))
        if mesh.any(taken):
            raise CheckpointError(
                f"{folder} is in use by another run; stop that one, or choose another run.name"
            )
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks here
    return True
