"""`python -m xdlm_megatron` that dies by kill -9 at a chosen moment.

$DEATH is a JSON object; process `rank` (null: every one) dies
  {"at": a name of POINTS or MAIN_POINTS, "occurrence": n}: when it comes there for the n-th time;
  {"in": a name of PHASES, "occurrence": n, "seconds": s}: s seconds after the n-th of these began, by a timer
    of the kernel, whatever each of its threads does then; it leaves with TOO_LATE where the phase ends first;
  {"in": a name of FILES, "occurrence": n, "bytes": b}: when b bytes of the n-th of these are in the file.
Without $DEATH it lives, and its first process writes the seconds of every phase to $SECONDS.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

import xdlm_megatron.parallel  # noqa: F401
from xdlm_megatron.__main__ import main
from xdlm_megatron.checkpoint import writer
from xdlm_megatron.optim.ema import Ema
from xdlm_megatron.tracking import jsonl
from xdlm_megatron.train import run
from xdlm_megatron.train.loop import Loop
from xdlm_megatron.train.step import TrainStep

TOO_LATE = 99  # the status of a process that came out of its phase alive

# name: (where, function, before or after it)
POINTS: dict[str, tuple[Any, str, str]] = {
    "before a step": (TrainStep, "__call__", "before"),
    "between update and average": (Ema, "update", "before"),
    "after a step": (TrainStep, "__call__", "after"),
    "in an evaluation": (Ema, "_whole", "after"),
    "before a save": (writer.CheckpointWriter, "begin", "before"),
    "after a file of a save": (filesystem_async.FileSystemWriterAsync, "write_preloaded_data", "after"),
    "before the files are hashed": (writer, "describe", "before"),
    "before a publication": (writer.CheckpointWriter, "publish", "before"),
    "before the weights are taken": (run, "load_checkpoint", "after"),
    "after a load": (run.Run, "load", "after"),
}
# Moments of the process that writes the run folder.
MAIN_POINTS: dict[str, tuple[Any, str, str]] = {
    "in a line of metrics": (jsonl.JsonlTracker, "log", "torn line"),
    "after a line of metrics": (jsonl.JsonlTracker, "log", "after"),
    "before the manifest": (writer, "write_manifest", "before"),
    "before the flush": (writer, "_flush", "before"),
    "between rename and latest": (writer, "_point_latest", "before"),
    "between latest and the removal of old ones": (writer, "_point_latest", "after"),
    "in the removal of an old one": (shutil, "rmtree", "torn folder"),
    "before the recipe": (run, "write_recipe", "before"),
    "before old lines of metrics are removed": (run, "truncate_after", "before"),
    "as old lines of metrics are removed": (jsonl.os, "replace", "before"),
    "after the last step": (Loop, "run", "after"),
}
# name: (it begins before this function, and ends after this one has returned something)
PHASES: dict[str, tuple[tuple[Any, str], tuple[Any, str]]] = {
    "start": ((run, "build_run"), (run, "build_run")),
    "load": ((run, "_choose_start"), (run.Run, "load")),
    "step": ((TrainStep, "__call__"), (TrainStep, "__call__")),
    "save": ((run.Run, "state_to_save"), (writer.CheckpointWriter, "publish")),
}
# A file of a save: the first or the second of this process's tensors, and the plain values.
FILES = ("__{rank}_0.distcp", "__{rank}_1.distcp", "common.pt")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear_line(tracker: Any, step: int, metrics: Any) -> None:
    line = jsonl.encode_line(step, metrics, 0.0)
    os.write(tracker._fd, line[: len(line) // 2])


def tear_folder(path: Path, *_: Any, **__: Any) -> None:
    next(iter(sorted(Path(path).iterdir()))).unlink()


BEFORE: dict[str, Callable[..., None]] = {
    "before": lambda *_, **__: None,
    "torn line": tear_line,
    "torn folder": tear_folder,
}


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a function of a module or a class."""
    work = getattr(owner, name)
    wrapped = functools.wraps(work)(make(work))
    is_static = isinstance(vars(owner)[name], staticmethod)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def arm_point(point: str, occurrence: int) -> None:
    owner, name, when = (POINTS | MAIN_POINTS)[point]
    calls = []

    def make(work: Callable[..., Any]) -> Callable[..., Any]:
        def deadly(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            due = len(calls) == occurrence
            if due and when in BEFORE:
                BEFORE[when](*args, **kwargs)
                die()
            result = work(*args, **kwargs)
            if due:
                die()
            return result

        return deadly

    wrap(owner, name, make)


def watch(phase: str, begins: Callable[[], None], ends: Callable[[], None]) -> None:
    """Calls these where the phase begins and where it ends."""

    def make_first(work: Callable[..., Any]) -> Callable[..., Any]:
        def first(*args: Any, **kwargs: Any) -> Any:
            begins()
            return work(*args, **kwargs)

        return first

    def make_last(work: Callable[..., Any]) -> Callable[..., Any]:
        def last(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            if result is not None:  # `publish` without a save to publish
                ends()
            return result

        return last

    first, last = PHASES[phase]
    wrap(*first, make_first)
    wrap(*last, make_last)


class _SignalEvent(ctypes.Structure):
    """struct sigevent of timer_create(2)."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),  # 0: by a signal
        ("rest", ctypes.c_byte * 48),
    )


def die_in(seconds: float) -> None:
    """The kernel sends SIGKILL to this process after `seconds`."""
    libc = ctypes.CDLL(None, use_errno=True)
    timer = ctypes.c_void_p()
    event = _SignalEvent(None, signal.SIGKILL, 0)
    assert libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) == 0
    nanoseconds = max(1, int(seconds * 1e9))  # zero would disarm it
    interval_and_value = (ctypes.c_long * 4)(0, 0, *divmod(nanoseconds, 10**9))
    assert libc.timer_settime(timer, 0, interval_and_value, None) == 0


def arm_phase(phase: str, occurrence: int, seconds: float) -> None:
    begun = []

    def begins() -> None:
        begun.append(1)
        if len(begun) == occurrence:
            die_in(seconds)

    def ends() -> None:
        if len(begun) >= occurrence:
            os._exit(TOO_LATE)

    watch(phase, begins, ends)


class Torn(io.FileIO):
    """A file, written without a buffer, whose writer dies when `bytes_left` bytes are in it."""

    bytes_left = 0

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        if len(data) >= self.bytes_left:
            super().write(data[: self.bytes_left])
            die()
        self.bytes_left -= len(data)
        return super().write(data)


def arm_file(name: str, occurrence: int, num_bytes: int) -> None:
    opened = []

    def due(path: Any) -> bool:
        if Path(path).name == name:
            opened.append(1)
        return Path(path).name == name and len(opened) == occurrence

    def tearing_open(path: Any, mode: str) -> Any:
        if not due(path):
            return open(path, mode)
        file = Torn(path, mode)
        file.bytes_left = num_bytes
        return file

    def make(save: Callable[..., Any]) -> Callable[..., Any]:
        def tearing_save(values: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(path, str | Path):
                with tearing_open(path, "wb") as file:
                    save(values, file, *args, **kwargs)
            else:
                save(values, path, *args, **kwargs)

        return tearing_save

    if name.endswith(".distcp"):
        filesystem_async.open = tearing_open
    else:
        wrap(torch, "save", make)


def record(path: str) -> None:
    """The seconds of every phase, in order, as JSON at the end."""
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for phase, durations in seconds.items():
        begun: list[float] = []

        def begins(begun: list[float] = begun) -> None:
            begun.append(time.monotonic())

        def ends(begun: list[float] = begun, durations: list[float] = durations) -> None:
            durations.append(time.monotonic() - begun[-1])

        watch(phase, begins, ends)
    atexit.register(lambda: Path(path).write_text(json.dumps(seconds)))


if __name__ == "__main__":
    death = json.loads(os.environ.get("DEATH", "{}"))
    if not death:
        if os.environ["RANK"] == "0":
            record(os.environ["SECONDS"])
    elif death["rank"] in (int(os.environ["RANK"]), None):
        if "at" in death:
            arm_point(death["at"], death["occurrence"])
        elif "seconds" in death:
            arm_phase(death["in"], death["occurrence"], death["seconds"])
        else:
            arm_file(death["in"], death["occurrence"], death["bytes"])
    sys.exit(main())
