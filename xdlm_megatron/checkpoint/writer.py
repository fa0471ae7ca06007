"""Saving: written aside by every process, flushed, published by a rename; `latest` moves last.

1. `begin` plans with the other processes and hands this process's tensors to threads, which write and hash
   its files. With is_async they work on copies, and training goes on.
2. `publish`, once every process has written: the manifest, the flush, the rename, `latest`, and the removal
   of older checkpoints (retention.py).

Whatever interrupts this leaves the checkpoints before it as they were: only names that end in .tmp are torn.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from threading import Thread
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from xdlm_megatron.checkpoint.contents import FORMAT
from xdlm_megatron.checkpoint.integrity import describe, write_manifest
from xdlm_megatron.checkpoint.reader import LATEST, list_checkpoints, step_of
from xdlm_megatron.checkpoint.retention import to_remove
from xdlm_megatron.parallel.mesh import Mesh

_ASIDE = ".tmp"
_PROBE_BYTES = 1 << 20
_TORN = ("iostream error", "inline_container")  # torch.save's RuntimeErrors for a file not written whole


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message says why, and that the one before it is whole."""


class CheckpointWriter:
    """Writes the checkpoints of a run to `folder`, at most one at a time. All processes make every call."""

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        keep_last: int,
        keep_every: int | None = None,
        is_async: bool = False,
    ) -> None:
        self._folder = folder
        self._mesh = mesh
        self._kept = (keep_last, keep_every)
        self._is_async = is_async
        self._current: _Writing | None = None
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
        replicas = mesh.groups.dp_cp
        self._strategy = (
            FullyParallelSaveStrategyWrapper(strategy, replicas, do_cache_distribution=True)
            if replicas.size() > 1
            else strategy
        )

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint waits for `publish`; the same on every process."""
        return self._current is not None

    @property
    def is_written(self) -> bool:
        """Whether this process has written its part of it."""
        return self._current is None or not self._current.thread.is_alive()

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Starts to write `state`, each process with its own sharded tensors, after the save before it.

        Without is_async this process's files are written when it returns. Raises SaveError on every process.
        """
        self.publish()
        aside = self._folder / f"{_name(step)}{_ASIDE}"
        self._on_main(step, lambda: _make_room(aside))
        try:
            request = dist_checkpointing.save(
                state, str(aside), self._strategy, async_sharded_save=True, content_metadata=FORMAT
            )
        except OSError as error:
            raise self._cannot_save(step, error) from error
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _TORN):
                raise
            reason = f"a file could not be written whole ({str(error).rsplit('] . ', 1)[-1]})"
            raise self._cannot_save(step, OSError(reason)) from error
        self._current = _Writing(step, aside, request, is_copied=self._is_async)
        self._current.thread.start()
        if not self._is_async:
            self._current.thread.join()

    def publish(self) -> Path | None:
        """Waits for every process's part of the checkpoint in flight and publishes it; None where none is.

        Raises:
            SaveError: a process could not write; on every process. What was written of it is removed.
        """
        if self._current is None:
            return None
        self.wait()
        writing, self._current = self._current, None
        failure = None
        try:
            for finalize in writing.request.finalize_fns:
                finalize()
        except CheckpointException as error:  # every process meets it, only the first knows the reasons
            failure = "; ".join(f"process {rank}: {reason[0]}" for rank, reason in error.failures.items())
        except OSError as error:
            raise self._cannot_save(writing.step, error) from error
        parts = self._mesh.gather_on_main(writing.entries)

        def publish_on_main() -> Path:
            if failure is not None:
                shutil.rmtree(writing.aside, ignore_errors=True)
                raise OSError(failure)
            final = self._folder / _name(writing.step)
            write_manifest(writing.aside, {name: entry for part in parts for name, entry in part.items()})
            _flush(writing.aside, already={name for part in parts for name in part})
            if final.exists():
                _remove(final)
            writing.aside.rename(final)
            _point_latest(self._folder, final.name)
            self._remove_old(writing.step)
            return final

        return self._on_main(writing.step, publish_on_main)

    def wait(self) -> None:
        """Waits until this process writes no more; what it has written stays unpublished."""
        if self._current is not None:
            self._current.thread.join()

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """`begin` and `publish`; returns the published folder."""
        self.begin(step, state)
        path = self.publish()
        assert path is not None
        return path

    def _remove_old(self, step: int) -> None:
        # Later steps are of a run that was set back by editing `latest`; they stay until overtaken.
        so_far = {step_of(path): path for path in list_checkpoints(self._folder) if step_of(path) <= step}
        for old in to_remove(list(so_far), *self._kept):
            _remove(so_far[old])

    def _on_main(self, step: int, work: Any) -> Any:
        def checked() -> Any:
            try:
                return work()
            except OSError as error:
                raise self._cannot_save(step, error) from error

        return self._mesh.on_main(checked, SaveError)

    def _cannot_save(self, step: int, error: OSError) -> SaveError:
        latest = self._folder / LATEST
        before = f"from {latest.read_text().strip()}" if latest.exists() else "from the start"
        return SaveError(
            f"cannot save step {step} in {self._folder}: {error.strerror or error}; make room or mend the "
            f"disk, then go on by --resume, {before}"
        )


class _Writing:
    """A save in flight: this process's part of it."""

    def __init__(self, step: int, aside: Path, request: AsyncRequest, is_copied: bool) -> None:
        self.step = step
        self.aside = aside
        self.request = request
        self.entries: dict[str, dict[str, int | str]] = {}  # of the manifest, by file
        rank, buckets, results = request.async_fn_args or (0, [], None)
        self._arguments = (rank, [_on_cpu(bucket, is_copied) for bucket in buckets], results)
        self.thread = Thread(target=self._run, name=f"checkpoint-{step}")

    def _run(self) -> None:
        if self.request.async_fn is None:
            return
        self.request.async_fn(*self._arguments)  # errors too go to its queue of results
        names = [name for _, name, _ in self._arguments[1] if (self.aside / name).exists()]
        self.entries = describe(self.aside, names)
        self._arguments = (0, [], None)


def _on_cpu(bucket: tuple, is_copied: bool) -> tuple:
    """A bucket of upstream's with its tensors on the CPU; copied, so that training may change its own."""
    path, name, (blobs, tensors) = bucket
    return path, name, (blobs, [(item, tensor.to("cpu", copy=is_copied)) for item, tensor in tensors])


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _make_room(aside: Path) -> None:
    """An empty folder, cleared of what interruptions left. One process finds out here that a disk is full."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    for left in aside.parent.glob(f"step_*{_ASIDE}"):
        shutil.rmtree(left)
    aside.mkdir()
    probe = aside / "probe"
    with probe.open("wb") as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    probe.unlink()


def _remove(path: Path) -> None:
    """Removes a checkpoint, so that an interruption leaves no torn one under its name."""
    aside = path.with_name(f"{path.name}.old{_ASIDE}")
    path.rename(aside)
    shutil.rmtree(aside)


def _point_latest(folder: Path, name: str) -> None:
    aside = folder / f"{LATEST}{_ASIDE}"
    with aside.open("w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(folder / LATEST)
    _flush_directory(folder)


def _flush(folder: Path, already: set[str]) -> None:
    """Waits until the disk has every file of the folder, so that the rename never publishes a torn one.

    already: names of files that their writers have flushed.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in already:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
