"""Where the curves of two runs part: bit by bit, and by more than a tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One step that both runs logged."""

    step: int
    a: float
    b: float

    @property
    def difference(self) -> float:
        """b - a; 0 where the values are the same bits or both NaN, infinite where one is not finite."""
        if self.same:
            return 0.0
        return self.b - self.a if math.isfinite(self.a) and math.isfinite(self.b) else math.inf

    @property
    def relative(self) -> float:
        """|b - a| over the larger of the two; 2 at most between finite values."""
        if not math.isfinite(self.difference):
            return math.inf
        return abs(self.difference) / max(abs(self.a), abs(self.b)) if self.difference else 0.0

    @property
    def same(self) -> bool:
        return self.a == self.b or (math.isnan(self.a) and math.isnan(self.b))


@dataclass(frozen=True)
class Comparison:
    """Two curves of one metric; points in the order of their steps."""

    points: list[Point]
    only_a: list[int]
    only_b: list[int]

    def first_beyond(self, tolerance: float) -> Point | None:
        """The first point whose relative difference exceeds the tolerance; 0 asks for the same value."""
        return next((point for point in self.points if point.relative > tolerance), None)

    @property
    def largest_absolute(self) -> Point:
        return max(self.points, key=lambda point: abs(point.difference))

    @property
    def largest_relative(self) -> Point:
        return max(self.points, key=lambda point: point.relative)


def compare_curves(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], metric: str) -> Comparison:
    """Compares `metric` of two runs' records. A step that was logged twice counts as it was logged last.

    Raises:
        ValueError: a run has never logged the metric, or no step is common to both.
    """
    first, second = _by_step(a, metric, "first"), _by_step(b, metric, "second")
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError(
            f"the runs have no step of {metric} in common: the first logged {_range(first)}, the second "
            f"{_range(second)}; compare runs of the same train.log_interval"
        )
    points = [Point(step, first[step], second[step]) for step in common]
    return Comparison(points, sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys()))


def _by_step(records: Sequence[Mapping[str, Any]], metric: str, which: str) -> dict[int, float]:
    found = {int(record["step"]): float(record[metric]) for record in records if metric in record}
    if not found:
        names = sorted({name for record in records for name in record} - {"step", "time"})
        raise ValueError(f"the {which} run has no {metric}; it has {', '.join(names) or 'nothing'}")
    return found


def _range(by_step: Mapping[int, float]) -> str:
    return f"steps {min(by_step)} to {max(by_step)} ({len(by_step)} lines)"
