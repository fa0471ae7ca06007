"""What one read of a vocabulary shard tells of every nucleus of its rows, before any rank knows which it is.

With y = l log2(e) / temperature, a logit's level is floor(y) and its bin a sixteenth of that. A survey keeps
for each bin its mass, in integers, so that no order of summation matters, and the first of its tokens to ring
in the race of token_race.py. The masses of all ranks then tell the bin in which the nucleus ends; all bins
above it lie inside. Where none of its tokens rings before theirs, or none fits, the winner is known
(`settle`); else that bin's tokens (`BinTokens`, one more read of the row) must tell, among which
nucleus_draw.py looks for the end. One rank alone has done so in its first read already
(kernels/csrc/posterior_nucleus.cu). Mass is right to 2^-16 of itself, and with it the end of a nucleus.

Shape suffixes: M rows at work, R ranks, S slots, D bins from the most probable one down, E tokens of bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.shard_rows import exp2_, refuse_broken
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

BINS_A_LEVEL, SLOTS = 16, 512  # 32 levels: what is less than 2^-31 as probable as the first is in no nucleus
LARGEST = 2.0**17  # of |y|: what is beyond counts as there
MASS_BITS, ID_BITS, NO_KEY = 15, 19, -(1 << 63)


class BinTokens(NamedTuple):
    """The tokens of one bin of each row in a shard, in any order, and places without one, of mass 0.

    row_E: whose they are. logits_E: float32. mass_E, best_E: int64, as a survey's.
    """

    row_E: Tensor
    logits_E: Tensor
    mass_E: Tensor
    best_E: Tensor


@dataclass(frozen=True)
class Survey:
    """Of M rows of a shard.

    top_M, zt_M: float32, the largest logit (NaN where one is) and z_t's (-inf where it is the mask or another
    rank's). mass_MS, best_MS: int64, of the bins at slot bin % SLOTS, down to SLOTS below the largest
    logit's: sum of 2^(y - level) in units of 2^-15; the largest key with its id, as `unpack` reads it.
    bin_tokens: (some of these rows, a bin of each, how many tokens it has at most) -> its tokens, by another
    read of the rows.
    """

    top_M: Tensor
    zt_M: Tensor
    mass_MS: Tensor
    best_MS: Tensor
    bin_tokens: Callable[[Tensor, Tensor, Tensor], BinTokens]

    def downwards(self, top_bin_M: Tensor, own_bin_M: Tensor) -> tuple[Tensor, Tensor]:
        """mass and best of the bins top_bin_M, top_bin_M - 1, ... [M, D]; own_bin_M: this shard's largest."""
        bin_MD = downwards_from(top_bin_M)
        slot_MD, empty_MD = bin_MD % SLOTS, bin_MD > own_bin_M[:, None]
        mass_MD, best_MD = (x_MS.gather(1, slot_MD) for x_MS in (self.mass_MS, self.best_MS))
        return mass_MD.masked_fill_(empty_MD, 0), best_MD.masked_fill_(empty_MD, NO_KEY)


def unpack(best_M: Tensor) -> tuple[Tensor, Tensor]:
    """(key, id) of one number: the larger key is the larger number, and of equal keys the lower id.

    The key's are the first 45 bits of a float64.
    """
    largest_id = (1 << ID_BITS) - 1
    ordered_M = best_M & ~largest_id
    bits_M = ordered_M ^ ((ordered_M >> 63) & ((1 << 63) - 1))
    return bits_M.view(torch.float64), largest_id - (best_M & largest_id)


def places_of(logits: Tensor, scale: float) -> Tensor:
    """y: float32. scale: log2(e) / temperature."""
    return (logits.float() * scale).clamp_(-LARGEST, LARGEST)


def bins_at(y: Tensor) -> Tensor:
    """Integers as float32."""
    return (y * BINS_A_LEVEL).sub_(0.5).round_()


def bins_of(logits: Tensor, scale: float) -> Tensor:
    """float32 -> int64."""
    return bins_at(places_of(logits, scale)).long()


def masses_at(y: Tensor, bins: Tensor) -> Tensor:
    """2^(y - level) in units of 2^-15, as bins_at gives the bins: integers as float32."""
    level = (bins / BINS_A_LEVEL).floor_()
    return exp2_(torch.sub(y, level, out=level)).mul_(2.0**MASS_BITS).round_()


def downwards_from(bin_M: Tensor) -> Tensor:
    """bin, bin - 1, ...: [M, D]."""
    return bin_M[:, None] - torch.arange(SLOTS, device=bin_M.device)


@dataclass(frozen=True)
class End:
    """Of M rows: the bin in which the nucleus ends, its mass, and how much of that still fits (less than it),
    in units of its level; whether it is the most probable token's.
    """

    bin_M: Tensor
    mass_M: Tensor
    room_M: Tensor
    is_first_M: Tensor

    def __getitem__(self, rows: slice | Tensor) -> End:
        return End(self.bin_M[rows], self.mass_M[rows], self.room_M[rows], self.is_first_M[rows])


@dataclass(frozen=True)
class Settled:
    """What the ranks' surveys say together of M rows.

    best_M: the first token to ring of those surely inside, as `unpack` reads it. zt_M: z_t's logit, float32.
    has_zt_M: whether it is inside. open_M: whether the end's tokens must be seen, of both.
    """

    end: End
    best_M: Tensor
    zt_M: Tensor
    has_zt_M: Tensor
    open_M: Tensor


def find_end(mass_MD: Tensor, top_bin_M: Tensor, top_p: float) -> End:
    """mass_MD: of all ranks, of the bins from top_bin_M down. In integers of at most 2^52."""
    level_MD = downwards_from(top_bin_M) // BINS_A_LEVEL
    below_MD = level_MD[:, :1] - level_MD
    down_MD = ((mass_MD << MASS_BITS) >> below_MD).cumsum(1)
    total_M = down_MD[:, -1]
    budget_M = torch.minimum((total_M.double() * top_p).long(), total_M - 1)
    end_M1 = (down_MD <= budget_M[:, None]).sum(1, keepdim=True)
    before_M = torch.nn.functional.pad(down_MD, (1, 0)).gather(1, end_M1)[:, 0]
    # the largest mass whose share of the total, rounded down, still fits
    room_M = (((budget_M - before_M + 1) << below_MD.gather(1, end_M1)[:, 0]) - 1) >> MASS_BITS
    mass_M, at_M = mass_MD.gather(1, end_M1)[:, 0], end_M1[:, 0]
    return End(top_bin_M - at_M, mass_M, room_M, at_M == 0)


def settle(survey: Survey, scale: float, top_p: float, group: dist.ProcessGroup | None) -> Settled:
    """Three messages: 8 bytes a row, 4 KiB, 16 bytes. Raises ValueError on what is not finite."""
    top_M, zt_M = gather_ranks(torch.stack([survey.top_M, survey.zt_M]), group).amax(0)
    refuse_broken(top_M)
    top_bin_M, zt_bin_M = bins_of(top_M, scale), bins_of(zt_M, scale)
    mass_MD, best_MD = survey.downwards(top_bin_M, bins_of(survey.top_M, scale))
    if group is not None:
        dist.all_reduce(mass_MD, group=group)
    end = find_end(mass_MD, top_bin_M, top_p)
    # one token's mass is at most 2^(1/16) of that at the bin's lower end, that of two at least twice
    lower_M = 2.0**MASS_BITS * torch.exp2(end.bin_M.double() % BINS_A_LEVEL / BINS_A_LEVEL)
    alone_M = end.mass_M < 1.5 * lower_M
    only_M = end.is_first_M & alone_M  # the most probable token is the nucleus
    none_M = ~end.is_first_M & (alone_M | (end.room_M < 0.9 * lower_M))
    best_MD = best_MD.cummax(1).values
    end_M1 = (top_bin_M - end.bin_M)[:, None]
    above_M, with_M = (best_MD.gather(1, at_M1)[:, 0] for at_M1 in ((end_M1 - 1).clamp_min(0), end_M1))
    best_2M = torch.stack([above_M.masked_fill(end.is_first_M, NO_KEY), with_M])
    above_M, with_M = gather_ranks(best_2M, group).amax(0)
    at_end_M = zt_bin_M == end.bin_M
    has_zt_M = (zt_bin_M > end.bin_M) | (at_end_M & only_M)
    open_M = ~(only_M | none_M) & ((with_M > above_M) | at_end_M)
    return Settled(end, torch.where(only_M, with_M, above_M), zt_M, has_zt_M, open_M)
