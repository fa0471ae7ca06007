"""Figures with their errors, and files of them. NumPy only."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    standard_error: float


def mean_of(values: Sequence[float]) -> Estimate:
    """Of independent values; the error of a single one is unknown, NaN."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return Estimate(float(np.mean(values)), float(deviation / np.sqrt(len(values))))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """JSON; numbers that are not finite, which it lacks, become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(record), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
