"""Top-p over a vocabulary split among ranks: which tokens of a row carry the first top_p of its probability.

The law is posterior.token_law's: from the most probable token down, equals by id, all whose cumulative
probability stays within top_p; the first always. No row is sorted or gathered. The masses of the bins of
survey.py, summed over the ranks (4 KiB a row), tell in which of them the nucleus ends. A radix search among
that bin's tokens then finds the first that does not fit. A token's order is one integer, the bits of its
float32 logit and then those of its id; each round fixes eight of them, by a histogram of 256 digits (2 KiB a
row). Masses are integers, so that no order of summation matters: a split vocabulary ends a nucleus at the
same token. The kernels count alike, but for the rounding of their exponentials, a unit of 2^-15 in few
tokens.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, E tokens of
a bin, R ranks, D slots or digits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import LOG2_E, refuse_broken, shard_rows
from xdlm_megatron.diffusion.survey import SLOTS, End, bins_at, bins_of, find_end, masses_at, places_of
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS


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

    Raises ValueError on what is not finite.
    """
    scale = LOG2_E / temperature
    floor_M = torch.empty(len(index_M), device=logits_NP.device)
    last_M = torch.empty_like(index_M)
    for rows, x_CP in shard_rows(logits_NP, index_M, shard, beside=4 * SLOTS):
        top_C = gather_ranks(x_CP.amax(-1), group).amax(0)
        refuse_broken(top_C)
        end, tokens = _find_bin(x_CP, top_C, scale, top_p, shard, group)
        least_C = least_order(*tokens, end, order_bits(shard.noise), group)
        floor_M[rows], last_M[rows] = split_order(least_C, shard.noise)
    return Nucleus(floor_M, last_M)


def _find_bin(
    x_CP: Tensor, top_C: Tensor, scale: float, top_p: float, shard: Shard, group: dist.ProcessGroup | None
) -> tuple[End, tuple[Tensor, Tensor, Tensor]]:
    """The bin in which the nucleus ends, and this rank's tokens of it: row, order and mass of each."""
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
    order_E = order_of(x_CP[at], shard.first_id + at[1], shard.noise)
    return end, (at[0], order_E, mass_CP[at].long())


def order_of(logits_E: Tensor, id_E: Tensor, noise: StationaryNoise) -> Tensor:
    """int64 in [0, 2^order_bits): the more probable token's is the larger, of equals the lower id's."""
    return ((ordered_bits(logits_E) + (1 << 31)) << id_bits(noise)) + ((1 << id_bits(noise)) - 1 - id_E)


def split_order(order_E: Tensor, noise: StationaryNoise) -> tuple[Tensor, Tensor]:
    """(logit, id): the inverse of order_of."""
    width = id_bits(noise)
    return from_ordered_bits((order_E >> width) - (1 << 31)), (1 << width) - 1 - order_E % (1 << width)


def id_bits(noise: StationaryNoise) -> int:
    """Bits of an id: at most 31 (order_of's number is one of int64)."""
    return (noise.vocab_size - 1).bit_length()


def order_bits(noise: StationaryNoise) -> int:
    """Bits of an order."""
    return 32 + id_bits(noise)


def ordered_bits(x: Tensor) -> Tensor:
    """float32 -> int64 in [-2^31, 2^31) of the same order; both zeros are 0."""
    bits = (x + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def from_ordered_bits(key: Tensor) -> Tensor:
    """The inverse of ordered_bits."""
    bits = key.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def least_order(
    row_E: Tensor, order_E: Tensor, mass_E: Tensor, end: End, bits: int, group: dist.ProcessGroup | None
) -> Tensor:
    """Of all ranks' tokens of the bins in which nuclei end, those of this order or more lie inside: [C]."""
    found_C, above_C = torch.zeros_like(end.room_M), torch.zeros_like(end.room_M)
    for shift in reversed(range(0, bits, DIGIT_BITS)):
        digit_E = DIGITS - 1 - (order_E >> shift) % DIGITS
        apart_E = order_E >> (shift + DIGIT_BITS) != found_C[row_E]
        mass_D = mass_E.new_zeros(len(found_C) * DIGITS)
        mass_D.index_add_(0, row_E * DIGITS + digit_E, mass_E.masked_fill(apart_E, 0))
        if group is not None:
            dist.all_reduce(mass_D, group=group)
        down_CD = mass_D.view(-1, DIGITS).cumsum(-1)
        fits_C1 = (above_C[:, None] + down_CD <= end.room_M[:, None]).sum(-1, keepdim=True)
        above_C += torch.nn.functional.pad(down_CD, (1, 0)).gather(1, fits_C1)[:, 0]
        found_C = found_C * DIGITS + DIGITS - 1 - fits_C1[:, 0]
    is_inside_C = end.is_first_M & (above_C == 0)  # the most probable token, though it does not fit
    return found_C + 1 - is_inside_C.long()
