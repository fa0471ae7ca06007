"""What two runs have in common: every tensor of their checkpoints, every number that they logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from xdlm_megatron.checkpoint.summary import list_tensors, load_tensor


def load_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name: weights, optimizer, averages; whole, whatever layout wrote it."""
    return {tensor.name: load_tensor(checkpoint, tensor) for tensor in list_tensors(checkpoint)}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Bit for bit."""
    first, second = load_tensors(one), load_tensors(other)
    assert first.keys() == second.keys()
    assert any(name.startswith("ema.") for name in first)
    assert any("exp_avg_sq" in name for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def read_numbers(metrics: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl without what a clock has measured."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name != "time" and not name.startswith("perf/")}
        for line in lines
    ]
