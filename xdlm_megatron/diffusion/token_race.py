"""A race among all tokens of a row that p's draw wins: by one read of a vocabulary shard's chosen rows.

Every token has a clock that rings after an exponential time of rate 2^x, x = l log2(e) / temperature; the
first to ring is a draw from p, and its time is exponential of rate sum(2^x), *whichever token it is*. Keys
are -log2 of times: the largest wins. Eight columns are a tile, of mass w = sum of 2^x. Its first ring comes
at E / w, E exponential of mean 1, an inverse CDF over its columns gives the token, and each of its other
clocks rings an exponential time of its own later (memorylessness), which is drawn where it matters: among the
tokens of a nucleus (nucleus_draw.py). Comparing keys commutes with splitting the vocabulary, so that every
tensor-parallel size draws the same ids from the same logits, bit for bit.

Random numbers: philox(key, (position, step, row, draw)), with draws of their own for every tile. An
exponential has 32 random bits, and 64 where it is small, which is where races are won: float noise of 24 bits
would cut the tail and lower the temperature (arXiv 2409.02908). Logits are worked on in float32, tiles in
float64.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, T tiles of it, W
tiles wherever they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Key, Word, philox, unit_interval
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import LOG2_E, TILE, exp2_, shard_rows
from xdlm_megatron.diffusion.survey import Survey

LANES = 32  # a counter's four words go to four tiles, this many apart: a warp reads tiles side by side
# draws of a row: three of it alone, then + index of a counter's tiles, + index of a tile, or 4 times that +
# 0..3
JUMP_DRAW, STAY_DRAW, NOISE_DRAW = 0, 1, 2
TILE_DRAWS, REFINING_DRAWS, FIRST_DRAWS, LATER_DRAWS = 1 << 30, 1 << 31, 5 << 29, 3 << 30
REFINE_BELOW = 1 << 12  # words below it get 32 bits more: their share of the law is then right to 3e-9


@dataclass(frozen=True)
class Counters:
    """Names the random numbers of M rows. position_M, row_M: int64 in [0, 2^32)."""

    key: Key
    step: int
    position_M: Tensor
    row_M: Tensor

    def words(self, draw: Word) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four 32-bit words a row; a draw of shape [M, ...] or [1, ...] gives words of shape [M, ...]."""
        extra = (1,) * (draw.dim() - 1) if isinstance(draw, Tensor) else ()
        position, row = self.position_M.view(-1, *extra), self.row_M.view(-1, *extra)
        return philox(self.key, (position, self.step, row, draw))

    def __getitem__(self, rows: slice | Tensor) -> Counters:
        return Counters(self.key, self.step, self.position_M[rows], self.row_M[rows])


class ChosenRows(NamedTuple):
    """Rows of a vocabulary shard's logits that tokens are drawn from.

    logits_NP: any float dtype. index_M: which of its rows, int64. zt_M: int64 global ids. counters: names of
    the rows' random numbers. shard: its first id is a multiple of 8.
    """

    logits_NP: Tensor
    index_M: Tensor
    zt_M: Tensor
    counters: Counters
    shard: Shard
    temperature: float = 1.0

    @property
    def scale(self) -> float:
        """Of logits to logarithms of base 2."""
        return LOG2_E / self.temperature

    def only(self, at: Tensor) -> ChosenRows:
        """Some of the rows."""
        return self._replace(index_M=self.index_M[at], zt_M=self.zt_M[at], counters=self.counters[at])


class Draw(NamedTuple):
    """Who reads the logits for a sampling step; `nucleus` and `survey` give None of what they cannot take.

    shard: as draw_shard. nucleus: the same of the first top_p of p, of rows whose vocabulary is whole.
    survey: what one read of a shard tells of every nucleus (survey.py).
    """

    shard: Callable[[ChosenRows], Tensor]
    nucleus: Callable[[ChosenRows, float], Tensor | None] = lambda rows, top_p: None
    survey: Callable[[ChosenRows], Survey | None] = lambda rows: None


def draw_shard(chosen: ChosenRows) -> Tensor:
    """A token of each row from this rank's columns: float64 [3, M], (key, id, x of z_t).

    The key is -inf, and the id without meaning, where the shard has no token of p, and NaN where a logit is;
    x is -inf where z_t is the mask or another rank's.
    """
    logits_NP, index_M, zt_M, counters, shard, _ = chosen
    draw_3M = torch.empty(3, len(index_M), dtype=torch.float64, device=logits_NP.device)
    for rows, x_CP in shard_rows(logits_NP, index_M, shard):
        draw_3M[2, rows] = pick_column(x_CP, zt_M[rows] - shard.first_id).double() * chosen.scale
        key_CT, weight_CT8, _ = first_rings(x_CP, counters[rows], shard, chosen.scale)
        draw_3M[0, rows], tile_C = key_CT.max(-1)
        weight_C8 = weight_CT8[torch.arange(len(tile_C), device=tile_C.device), tile_C]
        column_C = first_columns(weight_C8, counters[rows], shard.first_id // TILE + tile_C)
        draw_3M[1, rows] = (shard.first_id + tile_C * TILE + column_C).double()
    return draw_3M


REFERENCE_DRAW = Draw(draw_shard)


def first_rings(
    x_CP: Tensor, counters: Counters, shard: Shard, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles' keys, float64 [C, T], their columns' weights 2^(x - top) [C, T, 8], in place of the logits, and
    their tops, float64 [C, T].
    """
    x_CT8 = x_CP.view(len(x_CP), -1, TILE)
    top_CT = x_CT8.amax(-1)
    weight_CT8 = exp2_(x_CT8.sub_(top_CT.clamp_min(torch.finfo(top_CT.dtype).min)[..., None]).mul_(scale))
    top_CT = top_CT.double() * scale
    exponential_CT = tile_exponentials(counters, shard.first_id // TILE, top_CT.shape[1])
    return top_CT + _tile_sums(weight_CT8).double().log2_() - exponential_CT.log2_(), weight_CT8, top_CT


def first_columns(weight_W8: Tensor, counters: Counters, tile_W: Tensor) -> Tensor:
    """The columns that ring first in tiles of these places in the whole vocabulary, one for each counter."""
    return _inverse_cdf(weight_W8.double(), unit_interval(*counters.words(FIRST_DRAWS + tile_W)[:2]))


def later_rings(
    weight_W8: Tensor, top_W: Tensor, key_W: Tensor, counters: Counters, tile_W: Tensor
) -> Tensor:
    """Keys of all columns of tiles whose first ring has key_W, were none of them the first: float64 [W, 8].

    A time of 2^-key and one of 2^-own add up.
    """
    word_W4 = counters.words(LATER_DRAWS + 4 * tile_W[:, None] + torch.arange(4, device=tile_W.device))
    pairs = [exponential(word_W4[0], word_W4[1]), exponential(word_W4[2], word_W4[3])]
    own_W8 = top_W[:, None] + weight_W8.double().log2() - torch.stack(pairs, -1).flatten(1).log2_()
    apart_W8 = (own_W8 - key_W[:, None]).abs()
    return torch.minimum(own_W8, key_W[:, None]) - torch.exp2(-apart_W8).log1p() * LOG2_E


def tile_exponentials(counters: Counters, first_tile: int, tiles: int) -> Tensor:
    """The tiles' exponentials, float64 [M, T], a function of each tile's place in the whole vocabulary."""
    block = 4 * LANES
    first, last = first_tile // block, (first_tile + tiles - 1) // block
    lanes = LANES if last > first else min(LANES, first_tile + tiles - first * block)
    begin_G, lane_L = (torch.arange(*x, device=counters.row_M.device) for x in ((first, last + 1), (lanes,)))
    draw_1GL = TILE_DRAWS + (begin_G[:, None] * LANES + lane_L)[None]
    words_MT = torch.stack(counters.words(draw_1GL), 2).flatten(1)  # [M, G, 4, L]: the tiles in order
    words_MT = words_MT[:, first_tile - first * block :][:, :tiles]
    low_MT = words_MT.new_full((), 1 << 31)
    if len(fine := (words_MT < REFINE_BELOW).nonzero()):
        row, tile = fine.unbind(1)
        low_MT = low_MT.expand(words_MT.shape).clone()
        low_MT[row, tile] = counters[row].words(REFINING_DRAWS + first_tile + tile)[0]
    return exponential(words_MT, low_MT)


def exponential(high: Tensor, low: Tensor) -> Tensor:
    """Two 32-bit words -> float64 > 0, exponential of mean 1, small where `high` is."""
    u = (high.double() + (low.double() + 0.5) * 2.0**-32) * 2.0**-32
    return -torch.log1p(-u.clamp_max(1 - 2.0**-53))


def _tile_sums(x_CT8: Tensor) -> Tensor:
    """Sums over tiles, in one fixed order."""
    four = x_CT8[..., :4] + x_CT8[..., 4:]
    two = four[..., :2] + four[..., 2:]
    return two[..., 0] + two[..., 1]


def _inverse_cdf(weight_C8: Tensor, u_C: Tensor) -> Tensor:
    """The column where the cumulative weight passes u in [0, 1) of the total; never one of weight 0."""
    cdf_C8 = weight_C8.cumsum(-1)
    total_C = cdf_C8[:, -1]
    target_C = torch.minimum(u_C * total_C, torch.nextafter(total_C, torch.zeros_like(total_C)))
    return (cdf_C8 <= target_C[:, None]).sum(-1)


def pick_column(x_CP: Tensor, column_C: Tensor) -> Tensor:
    """x[i, column_i], [C]; -inf where the column is another rank's."""
    owned_C = (column_C >= 0) & (column_C < x_CP.shape[1])
    picked_C = x_CP.gather(1, torch.where(owned_C, column_C, 0)[:, None])[:, 0]
    return torch.where(owned_C, picked_C, -torch.inf)
