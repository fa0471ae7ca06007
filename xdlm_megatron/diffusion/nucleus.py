"""Top-p over a vocabulary split among ranks: which tokens of a row carry the first top_p of its probability.

The law is posterior.token_law's: from the most probable token down, equals by id, all whose cumulative
probability stays within top_p; the first always. No row is sorted or gathered. The masses of the bins of
survey.py, summed over the ranks (4 KiB a row), tell in which of them the nucleus ends. A radix search over
the bits of its float32 logits, read as integers that order like them, then finds the largest logit that does
not fit whole: four rounds, each a histogram of 256 digits (2 KiB a row). Masses are integers, so that no
order of summation matters: a split vocabulary, and the kernels, end a nucleus at the same token.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, R ranks, D digits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import LOG2_E, refuse_nan, shard_rows
from xdlm_megatron.diffusion.survey import SLOTS, bins_of, find_end, masses_of
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

DIGITS = 256
SHIFTS = (24, 16, 8, 0)


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
    scale = LOG2_E / temperature
    for rows, x_CP in shard_rows(logits_NP, index_M, shard, beside=4 * SLOTS):
        top_C = gather_ranks(x_CP.amax(-1), group).amax(0)
        refuse_nan(top_C)
        top_bin_C, bin_CP = bins_of(top_C, scale), bins_of(x_CP, scale)
        mass_CP = masses_of(x_CP, scale).masked_fill_(x_CP == -torch.inf, 0)
        end = find_end(_histogram(top_bin_C[:, None] - bin_CP, mass_CP, SLOTS, group), top_bin_C, top_p)
        mass_CP.masked_fill_(bin_CP != end.bin_M[:, None], 0)
        key_C, above_C, within_C = _search(ordered_bits(x_CP), mass_CP, end.room_M, group)
        floor_M[rows] = from_ordered_bits(key_C)
        equal_CP = x_CP == floor_M[rows, None]
        count_RC = gather_ranks(equal_CP.sum(-1), group)
        kept_C = (end.room_M - above_C) // (within_C // count_RC.sum(0))
        kept_C = torch.where(end.is_first_M & (above_C == 0), kept_C.clamp_min(1), kept_C)
        rank = 0 if group is None else dist.get_rank(group)
        own_C1 = (kept_C - count_RC[:rank].sum(0))[:, None]
        last_C = torch.where(equal_CP & (equal_CP.cumsum(-1) <= own_C1), _columns(x_CP), -1).amax(-1)
        last_M[rows] = torch.where(last_C < 0, -1, shard.first_id + last_C)
    return Nucleus(floor_M, last_M)


def _histogram(slot_CP: Tensor, mass_CP: Tensor, slots: int, group: dist.ProcessGroup | None) -> Tensor:
    """The mass of each of the first slots, over all ranks' columns: int64 [C, slots]."""
    beyond_CP = slot_CP >= slots
    histogram_CD = mass_CP.new_zeros(len(mass_CP), slots)
    histogram_CD.scatter_add_(1, slot_CP.masked_fill(beyond_CP, 0), mass_CP.masked_fill(beyond_CP, 0))
    if group is not None:
        dist.all_reduce(histogram_CD, group=group)
    return histogram_CD


def ordered_bits(x: Tensor) -> Tensor:
    """float32 -> int64 in [-2^31, 2^31) of the same order; both zeros are 0."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def from_ordered_bits(key: Tensor) -> Tensor:
    """The inverse of ordered_bits."""
    bits = key.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _search(
    key_CP: Tensor, mass_CP: Tensor, room_C: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(key of the largest logit whose tokens do not all fit into room_C, mass above it, mass at it), [C].

    All ranks' columns count, those of mass 0 not. Each round fixes eight bits of the key, from the top.
    """
    found_C = torch.full_like(room_C, -1)  # the digits so far, the sign among them
    above_C = torch.zeros_like(room_C)
    for shift in SHIFTS:
        prefix_CP = (key_CP + (1 << 31)) >> shift
        if shift < SHIFTS[0]:
            mass_CP = mass_CP.masked_fill(prefix_CP >> 8 != found_C[:, None], 0)
        down_CD = _histogram(DIGITS - 1 - prefix_CP % DIGITS, mass_CP, DIGITS, group).cumsum(-1)
        fits_C1 = (above_C[:, None] + down_CD <= room_C[:, None]).sum(-1, keepdim=True)
        before_CD = torch.nn.functional.pad(down_CD, (1, 0))
        fitting_C, within_C = (x.gather(1, fits_C1)[:, 0] for x in (before_CD, down_CD))
        within_C, above_C = within_C - fitting_C, above_C + fitting_C
        digit_C = DIGITS - 1 - fits_C1[:, 0]
        found_C = digit_C if shift == SHIFTS[0] else found_C * DIGITS + digit_C
    return found_C - (1 << 31), above_C, within_C


def _columns(x_CP: Tensor) -> Tensor:
    return torch.arange(x_CP.shape[1], device=x_CP.device)
