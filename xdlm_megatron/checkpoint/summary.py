"""What a checkpoint holds, read without model, recipe and Megatron; one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from xdlm_megatron.checkpoint.integrity import CheckpointError

PARTS = ("model", "optimizer", "ema")


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, whatever layout wrote it in pieces."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize

    @property
    def part(self) -> str:
        """One of PARTS: the model's names have no prefix."""
        prefix = self.name.split(".", 1)[0]
        return prefix if prefix in PARTS else "model"


@dataclass(frozen=True)
class Stats:
    """Of the finite values; NaN where there is none. num_bad: how many are NaN or infinite."""

    minimum: float
    maximum: float
    rms: float
    num_bad: int


def list_tensors(path: Path) -> list[StoredTensor]:
    """Every tensor of a checkpoint, by part and name. Raises CheckpointError where this is none."""
    if not (path / ".metadata").is_file():
        raise CheckpointError(f"{path} is not a checkpoint folder; it is named like step_00001000")
    entries = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    found = [
        StoredTensor(name, tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    ]
    return sorted(found, key=lambda tensor: (PARTS.index(tensor.part), tensor.name))


def load_tensor(path: Path, tensor: StoredTensor) -> torch.Tensor:
    """The whole tensor, on the CPU."""
    state = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype)}
    _load_state_dict(state, storage_reader=FileSystemReader(str(path)), no_dist=True)
    return state[tensor.name]


def load_stats(path: Path, tensors: list[StoredTensor]) -> Iterator[tuple[StoredTensor, Stats]]:
    """Each tensor with the statistics of its values."""
    for tensor in tensors:
        yield tensor, stats(load_tensor(path, tensor))


def stats(values: torch.Tensor) -> Stats:
    """Statistics in float64, which no sum of squares leaves."""
    values = values.double().flatten()
    finite = values[values.isfinite()]
    num_bad = len(values) - len(finite)
    if not len(finite):
        return Stats(math.nan, math.nan, math.nan, num_bad)
    low, high = finite.aminmax()
    return Stats(low.item(), high.item(), finite.square().mean().sqrt().item(), num_bad)


def read_plain_values(path: Path) -> dict[str, Any]:
    """Train state, recipe and counters. Raises CheckpointError where they cannot be read."""
    try:
        values = torch.load(path / "common.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}/common.pt is missing; this is not a whole checkpoint") from None
    except Exception as error:  # torch has no error of its own for a damaged file
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{path}/common.pt cannot be read ({reason}); put it back from a copy"
        ) from error
    return dict(values)
