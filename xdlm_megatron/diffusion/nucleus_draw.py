"""The race of token_race.py among all ranks' tokens, or among those of a nucleus.

All tokens' clocks run as they do without a nucleus, and the first of its tokens to ring wins: so its law is p
cut to the nucleus, and a winner among all tokens that lies in the nucleus wins there too. A tile whose first
ring is outside goes on with its other clocks. There are three ways to the same tokens: to find the nucleus
and to draw from it, which reads the rows several times; a kernel that does so with one read, where one rank
has the whole vocabulary; or on several ranks one read, a survey (survey.py), and one more of the few rows of
which that cannot tell. The kernels' ways agree bit for bit, with each other and for any number of ranks: the
same keys and masses, of which nothing but maxima and sums of integers are taken.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, T tiles of it, W
tiles wherever they are, L those of them that go on, R ranks.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.nucleus import find_nucleus, least_order, order_bits, order_of
from xdlm_megatron.diffusion.shard_rows import TILE, shard_rows, winner_of_ranks
from xdlm_megatron.diffusion.survey import MASS_BITS, NO_KEY, Settled, Survey, settle, unpack
from xdlm_megatron.diffusion.token_race import (
    ChosenRows,
    Counters,
    Draw,
    first_columns,
    first_rings,
    later_rings,
    pick_column,
)
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

TOKENS = 1 << 20  # of the bins in which nuclei end, at once


def draw_tokens(
    draw: Draw, chosen: ChosenRows, top_p: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(key, id, x of z_t) of each row, the same on every rank of the group: float64, int64, float64, [M].

    top_p in (0, 1], 1 is all of p. x is -inf where z_t is the mask or outside the nucleus. Raises ValueError
    on what is not finite.
    """
    if top_p == 1:
        return _winners(draw.shard(chosen), group)
    if (group is None or group.size() == 1) and (share_3M := draw.nucleus(chosen, top_p)) is not None:
        return _winners(share_3M, None)
    survey = draw.survey(chosen)
    if survey is None:
        return _winners(draw_share(chosen, top_p, group), group)
    settled = settle(survey, chosen.scale, top_p, group)
    best_M, has_zt_M = settled.best_M, settled.has_zt_M
    if len(rest := settled.open_M.nonzero()[:, 0]):
        best_M[rest], has_zt_M[rest] = _draw_at_end(survey, settled, chosen, rest, group)
    return *unpack(best_M), torch.where(has_zt_M, settled.zt_M.double() * chosen.scale, -torch.inf)


def _draw_at_end(
    survey: Survey, settled: Settled, chosen: ChosenRows, rest: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(best, has_zt) of the rows `rest`, with the tokens of the bins in which their nuclei end."""
    best_M, has_zt_M, noise = settled.best_M[rest], settled.has_zt_M[rest], chosen.shard.noise
    most_M = settled.end.mass_M[rest] >> MASS_BITS  # no token of a bin has less than its level's
    for part in _parts(most_M):
        at, best_C, end = rest[part], best_M[part], settled.end[rest[part]]
        tokens = survey.bin_tokens(at, end.bin_M, most_M[part])
        order_E = order_of(tokens.logits_E, unpack(tokens.best_E)[1], noise)
        least_C = least_order(tokens.row_E, order_E, tokens.mass_E, end, order_bits(noise), group)
        inside_E = tokens.best_E.masked_fill(order_E < least_C[tokens.row_E], NO_KEY)
        best_C = best_C.scatter_reduce(0, tokens.row_E, inside_E, "amax")
        best_M[part] = gather_ranks(best_C, group).amax(0)
        has_zt_M[part] = order_of(settled.zt_M[at], chosen.zt_M[at], noise) >= least_C
    return best_M, has_zt_M


def _parts(most_M: Tensor) -> Iterator[slice]:
    """Rows of at most TOKENS tokens together, or one; most_M: of each row, of all ranks."""
    begin = total = 0
    for row, most in enumerate(most_M.tolist()):
        if total + most > TOKENS and row > begin:
            yield slice(begin, row)
            begin, total = row, 0
        total += most
    yield slice(begin, len(most_M))


def _winners(share_3M: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of all ranks' draws."""
    shares_R3M = gather_ranks(share_3M, group)
    return *winner_of_ranks(shares_R3M), shares_R3M[:, 2].amax(0)


def draw_share(chosen: ChosenRows, top_p: float, group: dist.ProcessGroup | None) -> Tensor:
    """As token_race.draw_shard, of the nucleus alone: several reads of each row."""
    logits_NP, index_M, zt_M, counters, shard, temperature = chosen
    scale = chosen.scale
    nucleus = find_nucleus(logits_NP, index_M, shard, temperature, top_p, group)
    draw_3M = torch.empty(3, len(index_M), dtype=torch.float64, device=logits_NP.device)
    for rows, x_CP in shard_rows(logits_NP, index_M, shard):
        held_CP = nucleus[rows].holds(x_CP, shard.first_id)
        x_C = pick_column(torch.where(held_CP, x_CP, -torch.inf), zt_M[rows] - shard.first_id)
        draw_3M[2, rows] = x_C.double() * scale
        key_CT, weight_CT8, top_CT = first_rings(x_CP, counters[rows], shard, scale)
        held_CT8 = held_CP.view_as(weight_CT8)
        row_W, tile_W = held_CT8.any(-1).nonzero().unbind(1)
        tiles = (held_CT8[row_W, tile_W], weight_CT8[row_W, tile_W], top_CT[row_W, tile_W])
        place_W = shard.first_id // TILE + tile_W
        held_key_W, column_W = _first_held(*tiles, key_CT[row_W, tile_W], row_W, counters[rows], place_W)
        key_CT.fill_(-torch.inf)
        key_CT[row_W, tile_W] = held_key_W
        column_CT = torch.zeros_like(key_CT, dtype=torch.int64)
        column_CT[row_W, tile_W] = column_W
        draw_3M[0, rows], tile_C = key_CT.max(-1)
        column_C = tile_C * TILE + column_CT.gather(1, tile_C[:, None])[:, 0]
        draw_3M[1, rows] = (shard.first_id + column_C).double()
    return draw_3M


def _first_held(
    held_W8: Tensor,
    weight_W8: Tensor,
    top_W: Tensor,
    key_W: Tensor,
    row_W: Tensor,
    counters: Counters,
    tile_W: Tensor,
) -> tuple[Tensor, Tensor]:
    """(key, column) of the first held column of a tile to ring; -inf where it cannot win its row."""
    column_W = first_columns(weight_W8, counters[row_W], tile_W)
    inside_W = held_W8.gather(1, column_W[:, None])[:, 0]
    first_W = torch.where(inside_W, key_W, -torch.inf)
    best_C = first_W.new_full((len(counters.row_M),), -torch.inf).scatter_reduce_(0, row_W, first_W, "amax")
    late_L = (~inside_W & (key_W > best_C[row_W])).nonzero()[:, 0]
    late = (weight_W8[late_L], top_W[late_L], key_W[late_L], counters[row_W[late_L]], tile_W[late_L])
    later_L8 = later_rings(*late)
    later_L8.masked_fill_(~held_W8[late_L], -torch.inf)
    first_W[late_L], column_W[late_L] = later_L8.max(-1)
    return first_W, column_W
