"""How a run ended: a file in its folder, and where it failed one line for the whole job."""

from __future__ import annotations

import fcntl
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from pathlib import Path

import torch.distributed as dist

from xdlm_megatron.checkpoint.writer import SaveError
from xdlm_megatron.tracking.tracker import one_line

OUTCOME = "outcome"
FINISHED, STOPPED, REQUEUE, FAILED = "finished", "stopped", "requeue", "failed"
LOST = "lost"  # failed because another process is gone, as with its node: a new start may well succeed

_LOST = "another process has died or does not answer"
_GLOO = ("gloo", "Connection closed by peer", "Connection reset by peer")
_DISK = (ENOSPC, EDQUOT, EFBIG, EIO, None)  # None: a write that the disk took a part of (tracking/jsonl.py)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change. told: a process has printed it."""

    told = False


class LostProcessError(TrainingError):
    """Another process has died or stands still: what this one meets, seldom why the job ends."""


class LostAtStartError(LostProcessError):
    """The same, before the run was this start's: nothing has begun, and no `outcome` says so."""


@dataclass
class Progress:
    """What a process is at, for messages. folder: the run's, once its `outcome` is this start's."""

    doing: str = "start"
    folder: Path | None = None


@contextmanager
def failures_explained(progress: Progress) -> Iterator[None]:
    """Makes TrainingErrors of a failed save, a full disk or a lost process; a job says once why it ended.

    The process group must outlive the block: once it closes, the others meet a lost process, and the cause
    must be told by then.
    """
    try:
        yield
    except Exception as error:
        explained = _explain(error, progress)
        if explained is None:  # a bug, or a user's mistake: its traceback or its line is still to come
            if progress.folder is not None:
                _record_failure(progress.folder, error)
            raise
        if not explained.told:
            if progress.folder is None or _record_failure(progress.folder, explained):
                print(f"error: {explained}", file=sys.stderr, flush=True)
            explained.told = True
        if explained is error:
            raise
        raise explained from error


def _explain(error: Exception, progress: Progress) -> TrainingError | None:
    if isinstance(error, TrainingError):
        return error
    if isinstance(error, SaveError):
        return TrainingError(str(error))
    if isinstance(error, OSError) and error.errno in _DISK and progress.folder is not None:
        return TrainingError(
            f"{progress.doing}: cannot write to {progress.folder}: {error.strerror or error}; make room or "
            "mend the disk, then go on by --resume"
        )
    return _lost_process(error, progress)


def forget_outcome(folder: Path) -> None:
    (folder / OUTCOME).unlink(missing_ok=True)


def record_outcome(folder: Path, text: str) -> bool:
    """Writes the file `outcome`, whose first word is one of the five above; False where there is one already.

    The first process that fails creates it, so that a job of many says once why it ended.
    """
    try:
        file = os.open(folder / OUTCOME, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    except OSError:
        return True
    with suppress(OSError):  # on a full disk the file stays empty
        os.write(file, f"{text}\n".encode())
    os.close(file)
    return True


def _record_failure(folder: Path, error: Exception) -> bool:
    """Whether this process is to tell: the first that fails, or that knows more than a lost process."""
    said = " ".join(str(error).split()) if isinstance(error, TrainingError) else one_line(error)
    text = f"{LOST if isinstance(error, LostProcessError) else FAILED}: {said}"
    if record_outcome(folder, text):
        return True
    if isinstance(error, LostProcessError):
        return False
    try:
        with (folder / OUTCOME).open("r+") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _LOST not in file.read():
                return False
            file.seek(0)
            file.write(f"{text}\n")
            file.truncate()
    except OSError:
        pass
    return True


def _lost_process(error: Exception, progress: Progress) -> LostProcessError | None:
    """The error to raise where a collective failed because of another process; None for any other error."""
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and not (
        isinstance(error, RuntimeError) and any(sign in text for sign in _GLOO)
    ):
        return None
    kind, cure = (
        (LostAtStartError, "start it again")
        if progress.folder is None
        else (LostProcessError, "go on by --resume")
    )
    return kind(
        f"{progress.doing}: {_LOST} ({_collective(error)}: {_reason(text)}); look for its last lines above, "
        f"then {cure}"
    )


def _collective(error: Exception) -> str:
    """The function that waited for the others."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    return next((name for name in reversed(names) if name not in ("wrapper", "wait")), "?")


def _reason(text: str) -> str:
    """The library's words without the place in its sources."""
    return text.rsplit("] ", 1)[-1][:160].rstrip(". ")
