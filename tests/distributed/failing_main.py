"""`python -m xdlm_megatron` in which the disk is full, or the loss jumps, at a chosen moment.

$FAILURE is {"what": a name of FAILURES or FILES, "rank": r, "step": n}.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

import xdlm_megatron.parallel  # noqa: F401
from xdlm_megatron.__main__ import main
from xdlm_megatron.checkpoint import writer
from xdlm_megatron.tracking import jsonl
from xdlm_megatron.train.state import TrainState
from xdlm_megatron.train.step import StepResult, TrainStep

FAILURES: dict[str, tuple[Any, str]] = {
    "a file of a checkpoint": (filesystem_async, "_write_item"),
    "the folder of a checkpoint": (writer, "_make_room"),
    "the manifest": (writer, "write_manifest"),
    "latest": (writer, "_point_latest"),
    "a line of metrics": (jsonl.JsonlTracker, "log"),
}
FILES = ("common.pt", "metadata.json")  # of a checkpoint: the system itself refuses what is written to them
step, failure = TrainStep.__call__, json.loads(os.environ["FAILURE"])


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def room_with_full_file(aside: Path, make_room: Callable[[Path], None] = writer._make_room) -> None:
    make_room(aside)
    (aside / failure["what"]).symlink_to("/dev/full")


def step_with_full_disk(self: TrainStep, state: TrainState) -> StepResult:
    if state.step + 1 == failure["step"] and failure["what"] in FILES:
        writer._make_room = room_with_full_file
    elif state.step + 1 == failure["step"]:
        setattr(*FAILURES[failure["what"]], full_disk)
    return step(self, state)


def step_with_spike(self: TrainStep, state: TrainState) -> StepResult:
    """Places 3 and 5 of the batch cost much more, whoever counts them; 5 by "add" more, as inf or NaN."""
    result = step(self, state)
    if state.step == failure["step"]:
        by_slot = result.by_slot.clone()
        by_slot[0, 3] *= 1000
        by_slot[0, 5] *= 2000
        by_slot[0, 5] += failure.get("add", 0)
        return dataclasses.replace(result, by_slot=by_slot)
    return result


if __name__ == "__main__":
    if failure["what"] == "spike":
        TrainStep.__call__ = step_with_spike
    elif int(os.environ["RANK"]) == failure["rank"]:
        TrainStep.__call__ = step_with_full_disk
    sys.exit(main())
