"""Samples and their noise: what the model reads and what the loss needs, as a function of sample ids.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdlm_megatron.data.packing import PackedDataset
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import Schedule, stratified_t


class Index(Protocol):
    """Which row of the dataset a global sample id shows (data/sampler.py)."""

    num_samples: int

    def rows(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Batch:
    """A noised micro-batch. Ids are int64, rates float64; the loss is per unit of t."""

    x0_BS: Tensor
    zt_BS: Tensor
    t_B: Tensor
    alpha_B: Tensor
    beta_B: Tensor
    dalpha_B: Tensor


@dataclass(frozen=True)
class NoisedSamples:
    """Builds micro-batches. The same sample ids give the same bits on every rank, layout and resume.

    index: a shuffle for training, an even spread for evaluation.
    streams: (times, noise), so that evaluation never touches training's randomness.
    positions: of every sample, those that this context-parallel rank holds.
    """

    dataset: PackedDataset
    index: Index
    noise: StationaryNoise
    schedule: Schedule
    seed: int
    t_min: float
    streams: tuple[Stream, Stream]
    device: torch.device
    positions: slice = field(default_factory=lambda: slice(None))

    def build(self, sample_ids: NDArray[np.int64], slots: NDArray[np.int64], batch_size: int) -> Batch:
        """The micro-batch of `sample_ids`, which stand at `slots` of a global batch of `batch_size`."""
        time_stream, noise_stream = self.streams
        rows = self.index.rows(sample_ids)
        x0_BS = torch.from_numpy(np.stack([self.dataset[int(row)][self.positions] for row in rows]))
        x0_BS = x0_BS.to(self.device, non_blocking=True)
        id_B = torch.from_numpy(sample_ids).to(self.device)
        slot_B = torch.from_numpy(slots).to(self.device)
        t_B = stratified_t((self.seed, time_stream), id_B, slot_B, batch_size, self.t_min)
        alpha_B = self.schedule.alpha(t_B)
        position_S = torch.arange(self.dataset.seq_length, device=self.device)[self.positions]
        zt_BS = self.noise.corrupt(x0_BS, alpha_B, (self.seed, noise_stream), (id_B[:, None], position_S))
        return Batch(x0_BS, zt_BS, t_B, alpha_B, self.schedule.beta(t_B), self.schedule.dalpha(t_B))
