"""The race of token_race.py among all ranks' tokens, or among those of a nucleus.

All tokens' clocks run as they do without a nucleus, and the first of its tokens to ring wins: so its law is p
cut to the nucleus, and a winner among all tokens that lies in the nucleus wins there too. A tile whose first
ring is outside goes on with its other clocks. There are three ways to the same tokens: to find the nucleus
and to draw from it, which reads the rows several times; a kernel that does so with one read, where one rank
has the whole vocabulary; or on several ranks one read, a survey (survey.py), and the first way for the few
rows of which that cannot tell.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, T tiles of it, W
tiles wherever they are, L those of them that go on, R ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.nucleus import find_nucleus
from xdlm_megatron.diffusion.shard_rows import TILE, shard_rows, winner_of_ranks
from xdlm_megatron.diffusion.survey import settle
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


def draw_tokens(
    draw: Draw, chosen: ChosenRows, top_p: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(key, id, x of z_t) of each row, the same on every rank of the group: float64, int64, float64, [M].

    top_p in (0, 1], 1 is all of p. x is -inf where z_t is the mask or outside the nucleus. Raises ValueError
    on NaN.
    """
    if top_p == 1:
        return _winners(draw.shard(chosen), group)
    if (group is None or group.size() == 1) and (share_3M := draw.nucleus(chosen, top_p)) is not None:
        return _winners(share_3M, None)
    survey = draw.survey(chosen)
    if survey is None:
        return _winners(draw_share(chosen, top_p, group), group)
    key_M, token_M, x_M, open_M = settle(survey, chosen.scale, top_p, group)
    if len(rest := open_M.nonzero()[:, 0]):
        share_3M = draw_share(chosen.only(rest), top_p, group)
        key_M[rest], token_M[rest], x_M[rest] = _winners(share_3M, group)
    return key_M, token_M, x_M


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
