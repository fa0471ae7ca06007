"""Top-p over a vocabulary split among ranks: which tokens of a row carry the first top_p of its probability.

The law is posterior.token_law's: from the most probable token down, equals by id, all whose cumulative
probability stays within top_p; the first always. No row is sorted or gathered. The masses of the bins of
survey.py, summed over the ranks (4 KiB a row), tell in which of them the nucleus ends. A radix search over
the bits of its float32 logits, read as integers that order like them, then finds the largest logit that does
not fit whole: four rounds, each a histogram of 256 digits (2 KiB a row). Masses are integers, so that no
order of summation matters: a split vocabulary ends a nucleus at the same token. The kernels count alike, but
for the rounding of their exponentials, a unit of 2^-15 in few tokens.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, E tokens of
a bin, R ranks, D slots or digits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import LOG2_E, ROWS, refuse_nan, shard_rows
from xdlm_megatron.diffusion.survey import SLOTS, End, bins_at, bins_of, find_end, masses_at, places_of
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
    M, scale = len(index_M), LOG2_E / temperature
    # torch's exp2 of a CPU rounds the last elements, fewer than 64, in another way: some rows more take them
    index_M = torch.cat([index_M, index_M[-1:].expand(-M % ROWS)])
    floor_M = torch.empty(len(index_M), device=logits_NP.device)
    last_M = torch.empty_like(index_M)
    for rows, x_CP in shard_rows(logits_NP, index_M, shard, beside=4 * SLOTS):
        top_C = gather_ranks(x_CP.amax(-1), group).amax(0)
        refuse_nan(top_C[: M - rows.start])
        end, tokens = _find_bin(x_CP, top_C, scale, top_p, group)
        key_C, above_C, within_C = _search(*tokens, end.room_M, group)
        floor_M[rows] = from_ordered_bits(key_C)
        equal_CP = x_CP == floor_M[rows, None]
        count_RC = gather_ranks(equal_CP.sum(-1), group)
        kept_C = (end.room_M - above_C) // (within_C // count_RC.sum(0))
        kept_C = torch.where(end.is_first_M & (above_C == 0), kept_C.clamp_min(1), kept_C)
        rank = 0 if group is None else dist.get_rank(group)
        own_C1 = (kept_C - count_RC[:rank].sum(0))[:, None]
        last_C = torch.where(equal_CP & (equal_CP.cumsum(-1) <= own_C1), _columns(x_CP), -1).amax(-1)
        last_M[rows] = torch.where(last_C < 0, -1, shard.first_id + last_C)
    return Nucleus(floor_M[:M], last_M[:M])


def _find_bin(
    x_CP: Tensor, top_C: Tensor, scale: float, top_p: float, group: dist.ProcessGroup | None
) -> tuple[End, tuple[Tensor, Tensor, Tensor]]:
    """The bin in which the nucleus ends, and this rank's tokens of it: row, ordered bits and mass of each."""
    y_CP = places_of(x_CP, scale)
    bin_CP = bins_at(y_CP)
    mass_CP = masses_at(y_CP, bin_CP)
    top_bin_C = bins_of(top_C, scale)
    slot_CP = (top_bin_C.float()[:, None] - bin_CP).clamp_max_(SLOTS).long()
    slot_CP.masked_fill_(x_CP == -torch.inf, SLOTS)  # beyond what counts
    mass_CD = slot_CP.new_zeros(len(x_CP), SLOTS + 1).scatter_add_(1, slot_CP, mass_CP.long())[:, :SLOTS]
    if group is not None:
        mass_CD = mass_CD.contiguous()
        dist.all_reduce(mass_CD, group=group)
    end = find_end(mass_CD, top_bin_C, top_p)
    at = (slot_CP == (top_bin_C - end.bin_M)[:, None]).nonzero(as_tuple=True)
    return end, (at[0], ordered_bits(x_CP[at]), mass_CP[at].long())


def ordered_bits(x: Tensor) -> Tensor:
    """float32 -> int64 in [-2^31, 2^31) of the same order; both zeros are 0."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def from_ordered_bits(key: Tensor) -> Tensor:
    """The inverse of ordered_bits."""
    bits = key.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _search(
    row_E: Tensor, key_E: Tensor, mass_E: Tensor, room_C: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(key of the largest logit whose tokens do not all fit into room_C, mass above it, mass at it), [C].

    All ranks' tokens count. Each round fixes eight bits of the key, from the top.
    """
    key_E = key_E + (1 << 31)
    found_C, above_C = torch.zeros_like(room_C), torch.zeros_like(room_C)
    for shift in SHIFTS:
        digit_E = DIGITS - 1 - (key_E >> shift) % DIGITS
        inside_E = key_E >> (shift + 8) == found_C[row_E]
        mass_D = mass_E.new_zeros(len(room_C) * DIGITS)
        mass_D.index_add_(0, row_E * DIGITS + digit_E, mass_E.masked_fill(~inside_E, 0))
        if group is not None:
            dist.all_reduce(mass_D, group=group)
        down_CD = mass_D.view(-1, DIGITS).cumsum(-1)
        fits_C1 = (above_C[:, None] + down_CD <= room_C[:, None]).sum(-1, keepdim=True)
        before_CD = torch.nn.functional.pad(down_CD, (1, 0))
        fitting_C, within_C = (x.gather(1, fits_C1)[:, 0] for x in (before_CD, down_CD))
        within_C, above_C = within_C - fitting_C, above_C + fitting_C
        found_C = found_C * DIGITS + DIGITS - 1 - fits_C1[:, 0]
    return found_C - (1 << 31), above_C, within_C


def _columns(x_CP: Tensor) -> Tensor:
    return torch.arange(x_CP.shape[1], device=x_CP.device)
