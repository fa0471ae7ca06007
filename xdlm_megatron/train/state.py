"""Where a run stands. Small, plain, and all that a resume needs beside the tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Counters of a run; `consumed_samples` alone decides which samples and which noise come next.

    unlogged: [nats, tokens] since the last logged line. recent_losses: of the last steps, nats per token,
    oldest first (spikes.py).
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    unlogged: list[float] = field(default_factory=lambda: [0.0, 0.0])
    recent_losses: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        return cls(**values)
