"""`python -m xdlm_megatron` that kills itself with -9 at a chosen moment.

$DEATH is {"point": a name of POINTS, "occurrence": n, "rank": r}: process r dies when it comes there for the
n-th time.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

import xdlm_megatron.parallel  # noqa: F401
from xdlm_megatron.__main__ import main
from xdlm_megatron.checkpoint import writer
from xdlm_megatron.optim.ema import Ema
from xdlm_megatron.tracking import jsonl
from xdlm_megatron.train import run
from xdlm_megatron.train.loop import Loop
from xdlm_megatron.train.step import TrainStep

# name: (where, function, before or after it)
POINTS: dict[str, tuple[Any, str, str]] = {
    "before a step": (TrainStep, "__call__", "before"),
    "between update and average": (Ema, "update", "before"),
    "after a step": (TrainStep, "__call__", "after"),
    "in an evaluation": (Ema, "_whole", "after"),
    "before a save": (writer.CheckpointWriter, "begin", "before"),
    "after a file of a save": (FileSystemWriterAsync, "write_preloaded_data", "after"),
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


def arm(point: str, occurrence: int) -> None:
    owner, name, when = (POINTS | MAIN_POINTS)[point]
    work = getattr(owner, name)
    calls = []

    @functools.wraps(work)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        due = len(calls) == occurrence
        if due and when in BEFORE:
            BEFORE[when](*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        result = work(*args, **kwargs)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, staticmethod(deadly) if owner is FileSystemWriterAsync else deadly)


if __name__ == "__main__":
    death = json.loads(os.environ["DEATH"])
    if int(os.environ["RANK"]) == death["rank"]:
        arm(death["point"], death["occurrence"])
    sys.exit(main())
