"""Loss spikes: a step whose loss stands far above those before it, and the samples that made it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SPIKES = "spikes.jsonl"
WINDOW = 100  # steps that a loss is compared with
ENOUGH = 20  # steps without which nothing is called a spike
NUM_WORST = 8  # samples that a report names
_NORMAL = 1.4826  # median absolute deviation -> standard deviation, for a normal law


@dataclass(frozen=True)
class Spike:
    """A step that stands out; losses in nats per token. worst: (sample id, its loss), the largest first."""

    step: int
    loss: float
    median: float
    threshold: float
    worst: list[tuple[int, float]]

    def __str__(self) -> str:
        worst = ", ".join(f"{sample} ({loss:.2f})" for sample, loss in self.worst)
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
    """The samples with the largest losses of a global batch whose first sample id is `first_id`."""
    values, slots = torch.topk(loss_by_slot, min(NUM_WORST, len(loss_by_slot)))
    return [(first_id + slot, value) for slot, value in zip(slots.tolist(), values.tolist(), strict=True)]


def append_spike(folder: Path, spike: Spike) -> None:
    """One line of spikes.jsonl."""
    line = {
        "step": spike.step,
        "loss": spike.loss,
        "median": spike.median,
        "threshold": spike.threshold,
        "worst": [{"sample": sample, "loss": loss} for sample, loss in spike.worst],
    }
    with (folder / SPIKES).open("a") as file:
        file.write(json.dumps(line) + "\n")
