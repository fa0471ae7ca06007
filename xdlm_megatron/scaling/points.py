"""What a fit is made from: one point a run, and the rows that could not be used."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from xdlm_megatron.scaling.to_mlflow import Sweep

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A finished run: N parameters saw D tokens, at C FLOPs in all, and reached a held-out loss."""

    run: str
    params: float
    tokens: float
    loss: float
    flops: float
    uniform_ratio: float | None = None


@dataclass(frozen=True)
class Skipped:
    """A row or run that was left out, and why."""

    source: str
    reason: str


@dataclass
class Collection:
    """All that was read. notes: what a reader of the fit must know of how it was counted.

    sweeps: those that points come from; None: some come from none.
    """

    points: list[Point] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sweeps: set[Sweep | None] = field(default_factory=set)

    def add(self, point: Point, source: str, sweep: Sweep | None = None) -> None:
        """Takes the point, or notes why it cannot be one."""
        reason = _flaw(point)
        if reason is None:
            self.points.append(point)
            self.sweeps.add(sweep)
        else:
            self.skipped.append(Skipped(source, reason))

    def by_uniform_ratio(self) -> dict[float | None, list[Point]]:
        """The points of each uniform_ratio, in increasing order; None: it was not given."""
        ratios = {point.uniform_ratio for point in self.points}
        ordered = sorted(ratios, key=lambda ratio: -1.0 if ratio is None else ratio)
        return {ratio: [p for p in self.points if p.uniform_ratio == ratio] for ratio in ordered}


@dataclass(frozen=True)
class Columns:
    """Points as arrays [n]; cluster numbers the run of each point."""

    params: Array
    tokens: Array
    loss: Array
    flops: Array
    cluster: NDArray[np.int64]

    @classmethod
    def of(cls, points: list[Point]) -> Columns:
        runs = list(dict.fromkeys(point.run for point in points))
        number = {run: index for index, run in enumerate(runs)}
        return cls(
            params=np.array([point.params for point in points], dtype=float),
            tokens=np.array([point.tokens for point in points], dtype=float),
            loss=np.array([point.loss for point in points], dtype=float),
            flops=np.array([point.flops for point in points], dtype=float),
            cluster=np.array([number[point.run] for point in points]),
        )

    def __len__(self) -> int:
        return len(self.loss)


def _flaw(point: Point) -> str | None:
    for name in ("params", "tokens", "loss", "flops"):
        value = getattr(point, name)
        if not (math.isfinite(value) and value > 0):
            return f"{name} is {value:g}, not a positive number"
    ratio = point.uniform_ratio
    if ratio is not None and not 0 <= ratio <= 1:
        return f"uniform_ratio is {ratio:g}, not in [0, 1]"
    return None
