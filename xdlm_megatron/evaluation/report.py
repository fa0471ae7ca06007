"""Results on disk: a JSON record, and the loss over time as a table and a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdlm_megatron.evaluation.bound import TimeBin


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


def write_by_time(path: Path, bins: Sequence[TimeBin]) -> None:
    """A line for each bin of t."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["t_start", "t_end", "nats_per_token_and_t", "standard_error", "tokens"])
        for each in bins:
            writer.writerow([f"{x:.6g}" for x in (each.start, each.end, *each.density)] + [each.num_tokens])


def draw_by_time(path: Path, bins: Sequence[TimeBin], title: str) -> None:
    """The density over t, whose mean is the held-out NELBO, with its standard errors."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from xdlm_megatron.tracking.plot import COLOURS, STYLE

    middle = [(each.start + each.end) / 2 for each in bins]
    density = [each.density.mean for each in bins]
    error = [e if math.isfinite(e := each.density.standard_error) else 0.0 for each in bins]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.errorbar(middle, density, yerr=error, color=COLOURS[0], marker="o", markersize=3, capsize=2)
        axes.set_xlabel("t (0: text, 1: noise)")
        axes.set_ylabel("nats per token and unit of t")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left", fontsize=10)
        figure.savefig(path, dpi=150)
