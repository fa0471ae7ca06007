"""How each run of a sweep stands, by its files and by Slurm's queue."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xdlm_megatron.launch.attempt import SweepFolder, is_claimed
from xdlm_megatron.launch.progress import last_records, outcome
from xdlm_megatron.scaling.collect import HELD_OUT_LOSS
from xdlm_megatron.scaling.sweep import Point

FINISHED, RUNNING, QUEUED, FAILED, STOPPED, MISSING = (
    "finished",
    "running",
    "queued",
    "failed",
    "stopped",  # as asked, by a signal, or without a word: it goes on when the sweep is started again
    "missing",
)
TO_DO = (FAILED, STOPPED, MISSING)


@dataclass(frozen=True)
class RunState:
    """step: the last one logged. loss: held out if there is one, else of training. remark: why it failed."""

    point: Point
    state: str
    step: int
    loss: float | None
    tokens_per_second: float | None
    cpu_seconds: float | None
    remark: str = ""

    @property
    def share(self) -> float:
        """Of its steps."""
        return 1.0 if self.state == FINISHED else self.step / self.point.config.train.num_steps


def read_states(folder: SweepFolder, points: Sequence[Point], queue: Mapping[str, str]) -> list[RunState]:
    """queue: what Slurm has of the sweep (launch/submit.py: active_runs)."""
    ends = _ends(folder)
    return [_state(folder, point, queue.get(point.name), ends.get(point.name, [])) for point in points]


def _state(folder: SweepFolder, point: Point, queued: str | None, ends: list[dict[str, Any]]) -> RunState:
    run = folder.run(point.name)
    words, records = outcome(run), last_records(run)
    state, remark = MISSING, ""
    if words.startswith("finished"):
        state = FINISHED
    elif is_claimed(folder.claim(point.name)) or queued in ("RUNNING", "COMPLETING"):
        state = RUNNING
    elif queued is not None:
        state = QUEUED
    elif words.startswith("failed"):
        state, remark = FAILED, words.removeprefix("failed: ")
    elif ends and ends[-1]["status"] > 0 and not words:  # ended before it could tell; below 0: a signal
        state, remark = FAILED, f"status {ends[-1]['status']}, see {folder.log(point.name)}"
    elif (run / "recipe.yaml").exists():
        state = STOPPED
    step = int(records[-1]["step"]) if records else 0
    return RunState(
        point,
        state,
        step,
        _last(records, HELD_OUT_LOSS) if state == FINISHED else _last(records, "train/nelbo"),
        _last(records, "perf/tokens_per_second"),
        sum(end["cpu_seconds"] for end in ends) if ends else None,
        remark,
    )


def _last(records: list[dict[str, Any]], name: str) -> float | None:
    return next((float(record[name]) for record in reversed(records) if name in record), None)


def _ends(folder: SweepFolder) -> dict[str, list[dict[str, Any]]]:
    """The noted ends of every run's starts, in order."""
    ends: dict[str, list[dict[str, Any]]] = {}
    if folder.attempts.exists():
        for number, line in enumerate(folder.attempts.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                record = json.loads(line)
            except ValueError:  # a disk that was full, a machine that failed
                raise ValueError(f"{folder.attempts}, line {number}: damaged; remove that line") from None
            if record["event"] == "end":
                ends.setdefault(record["run"], []).append(record)
    return ends
