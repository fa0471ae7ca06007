"""Top-p over a vocabulary split among ranks: which tokens of a row carry the first top_p of its probability.

The law is posterior.token_law's: from the most probable token down, equals by id, all whose cumulative
probability stays within top_p; the first always. No row is sorted or gathered. A radix search over the bits
of float32 logits, read as integers that order like them, finds the largest logit that does not fit whole:
four rounds, each a histogram of probability in 256 bins, summed over the ranks (2 KiB a row). Probability is
counted in integers of 2^-32 of the most probable token's, so that no order of summation matters.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, R ranks, D digits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import LOG2_E, refuse_nan, shard_rows
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

DIGITS = 256
SHIFTS = (24, 16, 8, 0)
UNIT = 2.0**32


@dataclass(frozen=True)
class Nucleus:
    """Of M rows: the logits (float32) above floor_M, and those equal to it of ids up to last_M."""

    floor_M: Tensor
    last_M: Tensor

    def __getitem__(self, rows: slice) -> "Nucleus":
        return Nucleus(self.floor_M[rows], self.last_M[rows])

    def holds(self, logits_MP: Tensor, first_id: int) -> Tensor:
        """bool [M, P]; the first column is first_id's."""
        id_P = torch.arange(first_id, first_id + logits_MP.shape[1], device=logits_MP.device)
        floor_M1, last_M1 = self.floor_M[:, None], self.last_M[:, None]
        return (logits_MP > floor_M1) | ((logits_MP == floor_M1) & (id_P <= last_M1))


def find_nucleus(
    logits_NP: Tensor,
    index_M: Tensor,
    shard: Shard,
    temperature: float,
    top_p: float,
    group: dist.ProcessGroup | None,
) -> Nucleus:
    """The nucleus of the rows index_M of logits_NP, as this rank of the group needs it; top_p in (0, 1).

    Raises ValueError on NaN.
    """
    floor_M = torch.empty(len(index_M), device=logits_NP.device)
    last_M = torch.empty_like(index_M)
    for rows, x_CP in shard_rows(logits_NP, index_M, shard, beside=4 * DIGITS):
        top_C = gather_ranks(x_CP.amax(-1), group).amax(0)
        refuse_nan(top_C)
        mass_CP = ((x_CP - top_C[:, None]) * (LOG2_E / temperature)).exp2_().mul_(UNIT).long()
        key_C, above_C, within_C, budget_C = _search(ordered_bits(x_CP), mass_CP, top_p, group)
        floor_M[rows] = from_ordered_bits(key_C)
        equal_CP = x_CP == floor_M[rows, None]
        count_RC = gather_ranks(equal_CP.sum(-1), group)
        kept_C = (budget_C - above_C) // (within_C // count_RC.sum(0))
        kept_C = torch.where(above_C == 0, kept_C.clamp_min(1), kept_C)
        rank = 0 if group is None else dist.get_rank(group)
        own_C1 = (kept_C - count_RC[:rank].sum(0))[:, None]
        last_C = torch.where(equal_CP & (equal_CP.cumsum(-1) <= own_C1), _columns(x_CP), -1).amax(-1)
        last_M[rows] = torch.where(last_C < 0, -1, shard.first_id + last_C)
    return Nucleus(floor_M, last_M)


def ordered_bits(x: Tensor) -> Tensor:
    """float32 -> int64 in [-2^31, 2^31) of the same order; both zeros are 0."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def from_ordered_bits(key: Tensor) -> Tensor:
    """The inverse of ordered_bits."""
    bits = key.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _search(
    key_CP: Tensor, mass_CP: Tensor, top_p: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(key of the largest logit whose tokens do not all fit, mass above it, mass at it, mass that fits), [C].

    All ranks' columns count. Each round fixes eight bits of the key, from the top.
    """
    digit_CP, inside_CP = (key_CP >> SHIFTS[0]) + DIGITS // 2, None
    key_C = above_C = budget_C = key_CP.new_zeros(len(key_CP))
    for shift in SHIFTS:
        if inside_CP is not None:
            digit_CP = (key_CP >> shift) & (DIGITS - 1)
            mass_CP = torch.where(inside_CP, mass_CP, 0)
        histogram_CD = mass_CP.new_zeros(len(key_CP), DIGITS).scatter_add_(1, digit_CP, mass_CP)
        if group is not None:
            dist.all_reduce(histogram_CD, group=group)
        down_CD = histogram_CD.flip(-1).cumsum(-1)
        if inside_CP is None:
            total_C = down_CD[:, -1]
            budget_C = torch.minimum((total_C.double() * top_p).long(), total_C - 1)
        fits_C1 = (above_C[:, None] + down_CD <= budget_C[:, None]).sum(-1, keepdim=True)
        before_CD = torch.nn.functional.pad(down_CD, (1, 0))
        fitting_C, within_C = (x.gather(1, fits_C1)[:, 0] for x in (before_CD, down_CD))
        within_C, above_C = within_C - fitting_C, above_C + fitting_C
        digit_C = DIGITS - 1 - fits_C1[:, 0]
        key_C = digit_C - DIGITS // 2 if inside_CP is None else key_C * DIGITS + digit_C
        inside_CP = key_CP >> shift == key_C[:, None]
    return key_C, above_C, within_C, budget_C


def _columns(x_CP: Tensor) -> Tensor:
    return torch.arange(x_CP.shape[1], device=x_CP.device)
