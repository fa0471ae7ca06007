"""Samples and their noise: what the model reads and what the loss needs, as a function of sample ids.

Shapes: B micro-batch, T positions of a sample, S of them that this context-parallel rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdlm_megatron.data.packing import PADDING, Packing
from xdlm_megatron.diffusion.counter_rng import Stream, bounded_int, philox, split_id, unit_interval
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import Schedule, document_t, stratified_t


class Index(Protocol):
    """Which row of the dataset a global sample id shows (data/sampler.py)."""

    num_samples: int

    def rows(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Batch:
    """A noised micro-batch. Ids are int64, rates float64; the loss is per unit of t.

    scored_BS: bool, the positions that are noised and have a loss. The others keep x0 and have dalpha 0.
    document_BT: int32, of whole samples, where attention stays within documents (PADDING is one); else None.
    """

    x0_BS: Tensor
    zt_BS: Tensor
    t_BS: Tensor
    alpha_BS: Tensor
    beta_BS: Tensor
    dalpha_BS: Tensor
    scored_BS: Tensor
    document_BT: Tensor | None = None


@dataclass(frozen=True)
class Clean:
    """A micro-batch before its noise: sample ids id_B int64, the rest as in Batch."""

    id_B: Tensor
    x0_BS: Tensor
    scored_BS: Tensor
    document_BT: Tensor | None


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """Which positions of a sample the model reads as one text, and which are noised and scored.

    separate: attention and positions stay within a document. time_per_document: so does the time.
    clean_prompts: prompts are neither noised nor scored. random_length_fraction: share of samples cut short.
    """

    separate: bool = False
    time_per_document: bool = False
    clean_prompts: bool = False
    random_length_fraction: float = 0.0


@dataclass(frozen=True)
class NoisedSamples:
    """Builds micro-batches. The same sample ids give the same bits on every rank, layout and resume.

    index: a shuffle for training, an even spread for evaluation.
    streams: (times, noise), so that evaluation never touches training's randomness.
    positions: of every sample, those that this context-parallel rank holds.
    """

    dataset: Packing
    index: Index
    noise: StationaryNoise
    schedule: Schedule
    seed: int
    t_min: float
    streams: tuple[Stream, Stream]
    device: torch.device
    positions: slice = field(default_factory=lambda: slice(None))
    rules: DocumentRules = field(default_factory=DocumentRules)

    def build(self, sample_ids: NDArray[np.int64], slots: NDArray[np.int64], batch_size: int) -> Batch:
        """The micro-batch of `sample_ids`, which stand at `slots` of a global batch of `batch_size`."""
        clean = self.clean(sample_ids)
        slot_B = self._stack(slots)
        t_B = stratified_t((self.seed, self.streams[0]), clean.id_B, slot_B, batch_size, self.t_min)
        t_BS = t_B[:, None].expand(clean.x0_BS.shape)
        if clean.document_BT is not None and self.rules.time_per_document:
            t_BS = document_t(t_B, clean.document_BT[:, self.positions], self.t_min)
        alpha_BS, dalpha_BS = self.schedule.alpha(t_BS), self.schedule.dalpha(t_BS)
        return Batch(
            clean.x0_BS,
            self.corrupt(clean, alpha_BS, self.streams[1]),
            t_BS,
            alpha_BS,
            self.schedule.beta(t_BS),
            torch.where(clean.scored_BS, dalpha_BS, 0.0),
            clean.scored_BS,
            clean.document_BT,
        )

    def clean(self, sample_ids: NDArray[np.int64]) -> Clean:
        """What the samples are before any noise."""
        rows = self.index.rows(sample_ids)
        x0_BS = self._stack([self.dataset[int(row)] for row in rows])[:, self.positions]
        document_BT = self._documents(rows, sample_ids)
        scored_BS = self._scored(rows, x0_BS, document_BT)
        return Clean(self._stack(sample_ids), x0_BS, scored_BS, document_BT)

    def corrupt(self, clean: Clean, alpha_BS: Tensor, stream: Stream) -> Tensor:
        """z_t [B, S] at the signal alpha_BS, by the noise of a stream; what is not scored keeps x0."""
        position_S = torch.arange(self.dataset.seq_length, device=self.device)[self.positions]
        counter = (clean.id_B[:, None], position_S)
        zt_BS = self.noise.corrupt(clean.x0_BS, alpha_BS, (self.seed, stream), counter)
        return torch.where(clean.scored_BS, zt_BS, clean.x0_BS)

    def _documents(self, rows: NDArray[np.int64], sample_ids: NDArray[np.int64]) -> Tensor | None:
        """[B, T] numbers of documents that attention keeps apart; None where it sees all of every sample."""
        T = self.dataset.seq_length
        length_B = self._lengths(sample_ids)
        if self.rules.separate:
            document_BT = self._stack([self.dataset.documents(int(row)) for row in rows])
        elif length_B.min() < T:
            document_BT = torch.zeros(len(rows), T, dtype=torch.int32, device=self.device)
        else:
            return None
        beyond_BT = torch.arange(T) >= length_B[:, None]
        return document_BT.masked_fill(beyond_BT.to(self.device), PADDING)

    def _lengths(self, sample_ids: NDArray[np.int64]) -> Tensor:
        """int64 [B] on the CPU: T, or for a share of the samples any number of 1 to T."""
        T = self.dataset.seq_length
        low_B, high_B = split_id(torch.from_numpy(sample_ids))
        chance, rest, length, _ = philox((self.seed, Stream.LENGTH), (0, 0, low_B, high_B))
        cut_B = unit_interval(chance, rest) < self.rules.random_length_fraction
        return torch.where(cut_B, 1 + bounded_int(length, T), T)

    def _scored(self, rows: NDArray[np.int64], x0_BS: Tensor, document_BT: Tensor | None) -> Tensor:
        scored_BS = torch.ones_like(x0_BS, dtype=torch.bool)
        if document_BT is not None:
            scored_BS &= document_BT[:, self.positions] != PADDING
        if self.rules.clean_prompts:
            prompts = [self.dataset.prompts(int(row))[self.positions] for row in rows]
            scored_BS &= ~self._stack(prompts)
        return scored_BS

    def _stack(self, arrays: NDArray[np.int64] | list[NDArray]) -> Tensor:
        return torch.from_numpy(np.asarray(arrays)).to(self.device, non_blocking=True)
