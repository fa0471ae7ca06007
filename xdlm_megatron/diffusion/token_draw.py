"""Tokens drawn from p at chosen positions, with their probability: what samplers that go by confidence read.

The token is nucleus_draw.py's race, or the likeliest at temperature 0. Confidence is the probability under
p itself: temperature and top-p reshape what is drawn, not how sure the network is (as LLaDA has it; here the
mask has probability 0). The normaliser is a sum of integers, 2^-40 of the likeliest token's probability each,
so that every tensor-parallel size finds the same number, bit for bit, from the same logits.

Shape suffixes: B batch, S sequence, N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.nucleus_draw import draw_tokens
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import (
    LOG2_E,
    best_shard,
    exp2_,
    shard_rows,
    tiled_shard,
    winner_of_ranks,
)
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, ChosenRows, Counters, Draw
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

UNIT_BITS = 40  # V 2^40 fits in int64 up to V = 2^23


class TokenDraw:
    """A Pick of prediction.py: float64 [3, M], a token's id, its probability, and that of the present id (0
    where it is the mask).
    """

    num_values = 3

    def __init__(
        self,
        noise: StationaryNoise,
        z_BS: Tensor,
        counters: Callable[[Tensor], Counters],
        temperature: float = 1.0,
        top_p: float = 1.0,
        draw: Draw = REFERENCE_DRAW,
    ) -> None:
        """z_BS: present ids. counters: flat positions -> names of their random numbers. temperature 0 takes
        the likeliest token, the lowest id of equals.
        """
        self.noise, self.z_BS, self.counters = noise, z_BS, counters
        self.temperature, self.top_p, self.draw = temperature, top_p, draw

    def __call__(
        self, at_M: Tensor, logits_NP: Tensor, index_M: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        """Raises ValueError on what is not finite."""
        shard = tiled_shard(logits_NP.shape[1], self.noise, group)
        rows = (logits_NP, index_M)
        z_M = self.z_BS.flatten()[at_M]
        top_M, token_M = winner_of_ranks(gather_ranks(best_shard(*rows, shard), group))
        if self.temperature > 0:
            chosen = ChosenRows(*rows, z_M, self.counters(at_M), shard, self.temperature)
            _, token_M, _ = draw_tokens(self.draw, chosen, self.top_p, group)
        own_2M = torch.stack([logits_of(*rows, ids_M, shard) for ids_M in (token_M, z_M)])
        share_2M = _shares(gather_ranks(own_2M, group).amax(0), top_M).double()
        return torch.cat([token_M[None].double(), share_2M / _mass(*rows, top_M, shard, group)])


def logits_of(logits_NP: Tensor, index_M: Tensor, ids_M: Tensor, shard: Shard) -> Tensor:
    """float64 [M]: each row's logit at one global id; -inf at the mask and where the id is another rank's."""
    column_M = ids_M - shard.first_id
    owned_M = (column_M >= 0) & (column_M < logits_NP.shape[1]) & ~shard.noise.is_mask(ids_M)
    value_M = logits_NP[index_M, torch.where(owned_M, column_M, 0)].double()
    return torch.where(owned_M, value_M, -torch.inf)


def _shares(x: Tensor, top: Tensor) -> Tensor:
    """float32: probabilities in units of 2^-40 of the likeliest token's, from logits."""
    return exp2_(x.float().sub_(top.float()).mul_(LOG2_E)).mul_(2.0**UNIT_BITS)


def _mass(
    logits_NP: Tensor, index_M: Tensor, top_M: Tensor, shard: Shard, group: dist.ProcessGroup | None
) -> Tensor:
    """The sum of all ranks' shares, int64 [M]; top_M: the rows' largest logits."""
    mass_M = torch.empty_like(index_M)
    for rows, x_CP in shard_rows(logits_NP, index_M, shard):
        mass_M[rows] = _shares(x_CP, top_M[rows, None]).long().sum(-1)
    return gather_ranks(mass_M, group).sum(0)
