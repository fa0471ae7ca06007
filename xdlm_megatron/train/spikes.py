"""Loss spikes: a step whose loss stands far above those before it, or is not finite, and its samples."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xdlm_megatron.tracking.jsonl import plain_number

SPIKES = "spikes.jsonl"
WINDOW = 100  # steps that a loss is compared with
ENOUGH = 20  # steps without which nothing is called a spike
NUM_WORST = 8  # samples that a report names
_NORMAL = 1.4826  # median absolute deviation -> standard deviation, for a normal law


@dataclass(frozen=True)
class Spike:
    """A step that stands out; losses in nats per token. worst: (sample id, its loss), NaN first.

    A loss that is not finite is a spike at any time; median and threshold are NaN while they tell little.
    """

    step: int
    loss: float
    median: float
    threshold: float
    worst: list[tuple[int, float]]

    def __str__(self) -> str:
        worst = ", ".join(f"{sample} ({loss:.2f})" for sample, loss in self.worst)
        if not math.isfinite(self.loss):
            return f"step {self.step}: the loss is {self.loss}; samples with the largest loss: {worst}"
        return (
            f"step {self.step}: loss {self.loss:.4f} is a spike, above {self.threshold:.4f} (median "
            f"{self.median:.4f} of the steps before); samples with the largest loss: {worst}"
        )


def threshold_of(recent: list[float], factor: float) -> tuple[float, float] | None:
    """(median, median + factor robust deviations) of the recent losses; None while they tell little."""
    if len(recent) < ENOUGH:
        return None
    median = statistics.median(recent)
    deviation = _NORMAL * statistics.median(abs(loss - median) for loss in recent)
    return (median, median + factor * deviation) if deviation else None


def remember(recent: list[float], loss: float) -> None:
    """Appends the loss in place and forgets those beyond the window."""
    recent.append(loss)
    del recent[:-WINDOW]


def worst_samples(loss_by_slot: Tensor, first_id: int) -> list[tuple[int, float]]:
    """The samples with the largest losses of a global batch whose first sample id is `first_id`.

    topk counts NaN as the largest of all.
    """
    values, slots = torch.topk(loss_by_slot, min(NUM_WORST, len(loss_by_slot)))
    return [(first_id + slot, value) for slot, value in zip(slots.tolist(), values.tolist(), strict=True)]


def append_spike(folder: Path, spike: Spike) -> None:
    """One line of spikes.jsonl; what is not finite stands there as in metrics.jsonl."""
    line = {
        "step": spike.step,
        "loss": plain_number("loss", spike.loss),
        "median": plain_number("median", spike.median),
        "threshold": plain_number("threshold", spike.threshold),
        "worst": [{"sample": sample, "loss": plain_number("loss", loss)} for sample, loss in spike.worst],
    }
    with (folder / SPIKES).open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
