"""Checkpoints on disk: written aside, flushed, published by a rename; `latest` moves last; checked when read.

checkpoints/
  latest              name of the newest whole checkpoint
  step_00000500/      Megatron's torch_dist format, and manifest.json (integrity.py)
  step_00001000.tmp/  being written, or left by an interruption; never read
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import dist_checkpointing

from xdlm_megatron.checkpoint.contents import FORMAT
from xdlm_megatron.checkpoint.integrity import (
    MANIFEST,
    CheckpointError,
    find_damage,
    newest_whole,
    write_manifest,
)
from xdlm_megatron.checkpoint.retention import to_remove
from xdlm_megatron.parallel.mesh import Mesh

LATEST = "latest"
_NAME = re.compile(r"step_(\d{8,})")
_NO_OTHER = "no older one beside it is whole; put the file back from a copy, or train again"
T = TypeVar("T")


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    mesh: Mesh,
    keep_last: int,
    keep_every: int | None = None,
) -> Path:
    """Writes `state` as the checkpoint of `step` and removes older ones (retention.py).

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
        write_manifest(aside)
        _flush(aside)
        aside.rename(final)
        _point_latest(folder, final.name)
        # Later steps are of a run that was set back by editing `latest`; they stay until overtaken.
        so_far = {step_of(path): path for path in list_checkpoints(folder) if step_of(path) <= step}
        for old in to_remove(list(so_far), keep_last, keep_every):
            shutil.rmtree(so_far[old])
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
    path = _read_latest(folder)
    if path is not None and not path.is_dir():
        others = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
        raise CheckpointError(
            f"{folder / LATEST} names {path.name}, which is not there (there: {others}); correct the file"
        )
    return path


def _read_latest(folder: Path) -> Path | None:
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    step_of(path)  # refuses what is no checkpoint's name, an empty file too
    return path


def check_whole(path: Path, mesh: Mesh) -> None:
    """Compares a checkpoint with its manifest, on the main process; all processes call it.

    Raises:
        CheckpointError: a file is missing, cut short or changed; on every process.
    """
    _together(mesh, lambda: _refuse_damaged(path, "to use it, give it by --checkpoint"))


def choose_start(folder: Path, mesh: Mesh, allow_fallback: bool) -> Path | None:
    """The checkpoint to go on from: `latest`, checked; with `allow_fallback` the newest whole one up to it.

    All processes call it; the main process reads the files. None where nothing was saved yet.

    Raises:
        CheckpointError: `latest` is gone or damaged; on every process.
    """

    def choose() -> Path | None:
        latest = _read_latest(folder) if allow_fallback else find_latest(folder)
        if latest is None:
            return None
        if not allow_fallback:
            return _refuse_damaged(latest, "to go on from it, add --allow-fallback")
        damage = find_damage(latest)
        if damage is None:
            return latest
        whole = newest_whole(_before(latest))
        if whole is None:
            raise CheckpointError(f"{latest} is damaged: {damage}; {_NO_OTHER}")
        print(f"{latest} is damaged: {damage}; goes on from {whole.name}, --allow-fallback", flush=True)
        return whole

    return _together(mesh, choose)


def _refuse_damaged(path: Path, cure: str) -> Path:
    damage = find_damage(path)
    if damage is None:
        return path
    whole = newest_whole(_before(path))
    other = _NO_OTHER if whole is None else f"the newest whole one before it is {whole}; {cure}"
    if damage.startswith(MANIFEST):
        other += f" (files known to be good: python tools/inspect_checkpoint.py {path} --write-manifest)"
    raise CheckpointError(f"{path} is damaged: {damage}; {other}")


def _before(path: Path) -> list[Path]:
    """The checkpoints of earlier steps beside this one, newest first; none for a folder of another name."""
    if not _NAME.fullmatch(path.name):
        return []
    return [other for other in reversed(list_checkpoints(path.parent)) if step_of(other) < step_of(path)]


def _together(mesh: Mesh, work: Callable[[], T]) -> T:
    """What `work` gives on the main process, or its CheckpointError, on every process."""
    outcome: list[Any] = [None, None]
    if mesh.is_main:
        try:
            outcome[0] = work()
        except CheckpointError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, device=mesh.device)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


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
