"""What a network made of z_t, and how it is asked: at chosen positions, by functions of rows of logits.

A model may keep its output head, and the rest of its vocabulary, to itself: samplers see ids and a few
numbers a position, the same on every process.

Shape suffixes: B batch, S sequence, V vocabulary, N rows of logits, M positions at work, P vocabulary shard,
K values a position.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.shard_rows import best_shard, tiled_shard, winner_of_ranks
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

Pick = Callable[[Tensor, Tensor, Tensor, dist.ProcessGroup | None], Tensor]
"""pick(at_M, logits_NP, index_M, group) -> [M] or [K, M]: at_M are flat positions in [B, S]; row index_M[i]
of logits_NP belongs to at_M[i] and holds this rank's columns; group: the ranks that share the vocabulary."""


class Prediction(ABC):
    """A network's output for one batch."""

    @abstractmethod
    def read(self, chosen_BS: Tensor, pick: Pick, num_values: int = 1) -> Tensor:
        """float64 [K, B, S], K = num_values: what `pick` says of the positions chosen_BS, bool, and 0
        elsewhere; the same on every process. `pick` may be called for some positions at a time.
        """

    @abstractmethod
    def guided(self, unconditional: Self, scale: float) -> Self:
        """(1 + scale) logits - scale unconditional logits: log p up to a constant a row."""

    def replace(self, ids_BS: Tensor, chosen_BS: Tensor, pick: Pick) -> Tensor:
        """ids_BS, int64, with the ids at chosen_BS replaced by picked ones."""
        return torch.where(chosen_BS, self.read(chosen_BS, pick)[0].long(), ids_BS)


class Logits(Prediction):
    """A prediction that is a tensor: logits [B, S, >= V]."""

    def __init__(self, logits_BSV: Tensor) -> None:
        self.logits_NV = logits_BSV.reshape(-1, logits_BSV.shape[-1])

    def read(self, chosen_BS: Tensor, pick: Pick, num_values: int = 1) -> Tensor:
        at_M = chosen_BS.flatten().nonzero()[:, 0]
        values_KN = torch.zeros(num_values, chosen_BS.numel(), dtype=torch.float64, device=at_M.device)
        values_KN[:, at_M] = pick(at_M, self.logits_NV, at_M, None).double()
        return values_KN.view(num_values, *chosen_BS.shape)

    def guided(self, unconditional: Self, scale: float) -> Self:
        mixed = type(self).__new__(type(self))
        mixed.logits_NV = self.logits_NV + scale * (self.logits_NV - unconditional.logits_NV)
        return mixed


Denoise = Callable[[Tensor], Tensor | Prediction]
"""zt_BS -> logits [B, S, >= V], or a Prediction."""


def as_prediction(output: Tensor | Prediction) -> Prediction:
    return Logits(output) if isinstance(output, Tensor) else output


def most_probable(
    noise: StationaryNoise,
    at_M: Tensor,
    logits_NP: Tensor,
    index_M: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The likeliest ids [M], the lowest of equals; after `noise`, a Pick. ValueError on NaN."""
    shard = tiled_shard(logits_NP.shape[1], noise, group)
    return winner_of_ranks(gather_ranks(best_shard(logits_NP, index_M, shard), group))[1]
