"""Checkpoints on disk: written aside, flushed, published by a rename; `latest` moves last.

checkpoints/
  latest              name of the newest whole checkpoint
  step_00000500/      Megatron's torch_dist format
  step_00001000.tmp/  being written, or left by an interruption; never read
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from xdlm_megatron.checkpoint.contents import FORMAT
from xdlm_megatron.parallel.mesh import Mesh

LATEST = "latest"
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is not there or cannot be used; the message names it and the cure."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], mesh: Mesh, keep_last: int) -> Path:
    """Writes `state` as the checkpoint of `step` and drops all but the `keep_last` newest up to it.

    All processes call it, each with its own sharded tensors. Returns the published folder.
    """
    final = folder / f"step_{step:08d}"
    aside = final.with_suffix(".tmp")
    if mesh.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    mesh.barrier()
    with _signals_wait():
        dist_checkpointing.save(state, str(aside), ("torch_dist", 1), content_metadata=FORMAT)
    mesh.barrier()
    if mesh.is_main:
        shutil.rmtree(final, ignore_errors=True)
        _flush(aside)
        aside.rename(final)
        _point_latest(folder, final.name)
        # Later steps are of a run that was set back by editing `latest`; they stay until overtaken.
        for old in [path for path in list_checkpoints(folder) if step_of(path) <= step][:-keep_last]:
            shutil.rmtree(old)
    mesh.barrier()
    return final


def load_checkpoint(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fills `state` (sharded tensors of this layout) from the checkpoint; plain values come with it."""
    return dist_checkpointing.load(state, str(path))


def load_plain_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, such as the train state, without its tensors."""
    return dist_checkpointing.load_common_state_dict(str(path))


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint folder's name tells."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(
            f"{path} is not a checkpoint; its name must be step_ and the step, as in step_00001000"
        )
    return int(match[1])


def find_latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, None where nothing was saved yet.

    Raises:
        CheckpointError: `latest` names a checkpoint that is gone.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if not path.is_dir():
        others = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
        raise CheckpointError(
            f"{pointer} names {path.name}, which is not there (there: {others}); correct the file"
        )
    return path


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Holds stop signals back. torchrun sends them to the whole process group, and Megatron writes through
    helper processes, which inherit this mask: else the signal that asks for a save would kill its writers.
    """
    resource_tracker.ensure_running()  # starting a helper would start it first, and that lifts the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _point_latest(folder: Path, name: str) -> None:
    aside = folder / f"{LATEST}.tmp"
    with aside.open("w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(folder / LATEST)
    _flush_directory(folder)


def _flush(folder: Path) -> None:
    """Waits until the disk has every file of the folder, so that the rename never publishes a torn one."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
