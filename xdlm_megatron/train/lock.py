"""One process group at a time trains into a run folder."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TypeVar

from xdlm_megatron.checkpoint.reader import CheckpointError
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.train.ending import forget_outcome

T = TypeVar("T")


def on_main_in(folder: Path, mesh: Mesh, work: Callable[[], T]) -> T:
    """What `work` gives on the main process, on all; it writes to the run's folder.

    Raises:
        CheckpointError: it cannot; on every process.
    """

    def explained() -> T:
        try:
            return work()
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or folder}: {error.strerror}; correct the path or its permissions, "
                "or choose another run.output_dir"
            ) from error

    return mesh.on_main(explained, CheckpointError)


@contextmanager
def locked_run(folder: Path, mesh: Mesh) -> Iterator[None]:
    """Makes the run's folder and holds the lock in it inside the block; the lock goes with the process.

    The `outcome` of the start before is forgotten: whatever this one meets, it is not how it ended.
    A file system without locks (some network ones) is used without.

    Raises:
        CheckpointError: another run holds it, or the folder cannot be written to; on every process.
    """
    with ExitStack() as stack:

        def take() -> bool:
            folder.mkdir(parents=True, exist_ok=True)
            if not _try_lock(stack.enter_context((folder / "lock").open("w"))):
                return False
            forget_outcome(folder)
            return True

        if not on_main_in(folder, mesh, take):
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
