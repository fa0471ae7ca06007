"""A draw from the reverse step of posterior.py that reads the logits of a few rows, once, and no posterior.

Three stages, for positions at z on the way from t to s:

0. `ReverseStep.settle` needs random numbers alone. Most positions stay whatever the network says
   (jump_bound); a mask that jumps to a uniform id or to the mask again is finished too. The rest need logits.
1. `draw_shard` reads this rank's columns of those rows and returns three numbers a row: a token of p as the
   winner of a race, its key in the race, and the logit of z.
2. `ReverseStep.pick` compares the ranks' winners and decides whether z leaves at all.

The race (Gumbel-max, in logarithms to base 2): each tile of 8 columns, of mass w = sum of 2^x with
x = l log2(e) / temperature, rings at a time E / w, E exponential of mean 1; its key is -log2 of that time.
The first tile to ring wins, and an inverse CDF over its 8 columns gives the token: an exact draw from p. The
winner's time is exponential of rate sum(w), *whichever tile wins*. A visible z is signal with probability
p_z / (p_z + c): that is the race of a clock of rate 2^x_z against one of rate c sum(w), and the second has
already been run. So z stays if x_z - log2(E') >= key + log2(c), with one more exponential E'. There is no sum
over the vocabulary. Comparing keys commutes with splitting the vocabulary, so that every tensor-parallel size
draws the same ids from the same logits, bit for bit.

Random numbers: philox(key, (position, step, row, draw)), with draws of their own for every tile. An
exponential has 32 random bits, and 64 where it is small, which is where races are won: float noise of 24 bits
would cut the tail and lower the temperature (arXiv 2409.02908). Logits are worked on in float32, tiles in
float64.

Shape suffixes: B batch, S sequence, N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard,
T tiles of it, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Key, Word, bounded_int, philox, unit_interval
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.nucleus import Nucleus, find_nucleus
from xdlm_megatron.diffusion.posterior import jump_bound
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import LOG2_E, TILE, shard_rows, tiled_shard, winner_of_ranks
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

LANES = 32  # a counter's four words go to four tiles, this many apart: a warp reads tiles side by side
JUMP_DRAW, TOKEN_DRAW, NOISE_DRAW = 0, 1, 2
TILE_DRAWS, REFINING_DRAWS = 1 << 30, 1 << 31  # + index of a counter's tiles, + index of a tile
REFINE_BELOW = 1 << 12  # words below it get 32 bits more: their share of the law is then right to 3e-9


@dataclass(frozen=True)
class Counters:
    """Names the random numbers of M rows. position_M, row_M: int64 in [0, 2^32)."""

    key: Key
    step: int
    position_M: Tensor
    row_M: Tensor

    def words(self, draw: Word) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four 32-bit words a row; a draw of shape [M, ...] gives words of that shape."""
        extra = (1,) * (draw.dim() - 1) if isinstance(draw, Tensor) else ()
        position, row = self.position_M.view(-1, *extra), self.row_M.view(-1, *extra)
        return philox(self.key, (position, self.step, row, draw))

    def __getitem__(self, rows: slice | Tensor) -> Counters:
        return Counters(self.key, self.step, self.position_M[rows], self.row_M[rows])


class DrawShard(Protocol):
    """The signature of draw_shard, for another way to compute it."""

    def __call__(
        self,
        logits_NP: Tensor,
        index_M: Tensor,
        zt_M: Tensor,
        counters: Counters,
        shard: Shard,
        temperature: float = 1.0,
        nucleus: Nucleus | None = None,
    ) -> Tensor: ...


def draw_shard(
    logits_NP: Tensor,
    index_M: Tensor,
    zt_M: Tensor,
    counters: Counters,
    shard: Shard,
    temperature: float = 1.0,
    nucleus: Nucleus | None = None,
) -> Tensor:
    """A token of each row from this rank's columns: float64 [3, M], (key, id, x of z_t).

    logits_NP: any float dtype; index_M: which of its rows are drawn from. zt_M: int64 global ids. shard: its
    first id is a multiple of 8. nucleus: None is all of p. The key is -inf, and the id without meaning, where
    the shard has no token of p, and NaN where a logit is; x is -inf where z_t is the mask, outside the
    nucleus or another rank's.
    """
    draw_3M = torch.empty(3, len(index_M), dtype=torch.float64, device=logits_NP.device)
    scale = LOG2_E / temperature
    for rows, x_CP in shard_rows(logits_NP, index_M, shard):
        if nucleus is not None:
            nucleus[rows].remove_others(x_CP, shard.first_id)
        draw_3M[2, rows] = pick_column(x_CP, zt_M[rows] - shard.first_id).double() * scale
        C, tiles = x_CP.shape[0], x_CP.shape[1] // TILE
        x_CT8 = x_CP.view(C, tiles, TILE)
        top_CT = x_CT8.amax(-1)
        x_CT8.sub_(top_CT.clamp_min(torch.finfo(top_CT.dtype).min)[..., None]).mul_(scale).exp2_()
        log_mass_CT = top_CT.double() * scale + _tile_sums(x_CT8).double().log2_()
        key_CT = log_mass_CT - tile_exponentials(counters[rows], shard.first_id // TILE, tiles).log2_()
        draw_3M[0, rows], tile_C = key_CT.max(-1)
        weight_C8 = x_CT8[torch.arange(C, device=tile_C.device), tile_C]
        column_C = _inverse_cdf(weight_C8.double(), unit_interval(*counters[rows].words(TOKEN_DRAW)[2:]))
        draw_3M[1, rows] = (shard.first_id + tile_C * TILE + column_C).double()
    return draw_3M


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


class ReverseStep:
    """One step from t to s: which positions leave their value, and for what."""

    def __init__(
        self,
        key: Key,
        step: int,
        row_B: Tensor,
        noise: StationaryNoise,
        alpha_s: Tensor,
        alpha_t: Tensor,
        temperature: float = 1.0,
        top_p: float = 1.0,
        draw: DrawShard = draw_shard,
    ) -> None:
        """alpha_s, alpha_t: float64 scalars. row_B: int64 [B], names the rows for the random numbers. draw:
        who reads the logits.
        """
        self.key, self.step, self.row_B, self.noise = key, step, row_B, noise
        self.alpha_s, self.alpha_t = alpha_s.to(row_B.device), alpha_t.to(row_B.device)
        self.temperature, self.top_p, self.draw = temperature, top_p, draw

    def settle(self, zt_BS: Tensor, free_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(z_s where random numbers alone decide it, bool: positions that need logits), both [B, S].

        Only positions of free_BS, bool, may change. Where logits are needed, z_s is z_t still.
        """
        at_M = torch.arange(zt_BS.numel(), device=zt_BS.device)
        counters = self.counters(at_M, zt_BS.shape[1])
        jump_M, component_M = _jump_uniforms(counters)
        masked_M = self.noise.is_mask(zt_BS.flatten())
        moves_M = free_BS.flatten() & (jump_M < jump_bound(self.alpha_s, self.alpha_t))
        if self.noise.uniform_ratio == 0:
            moves_M &= masked_M
        done_M = moves_M & masked_M & (component_M >= self.alpha_s)
        zs_M = torch.where(done_M, self._noise_ids(counters, component_M), zt_BS.flatten())
        return zs_M.view_as(zt_BS), (moves_M & ~done_M).view_as(zt_BS)

    def pick(
        self,
        zt_BS: Tensor,
        at_M: Tensor,
        logits_NP: Tensor,
        index_M: Tensor,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """z_s at the flat positions at_M of zt_BS, which settle() said need logits: int64 [M].

        Row index_M[i] of logits_NP, this rank's columns, belongs to at_M[i]. Every rank of the group calls
        this with the same positions and gets the same ids. Raises ValueError on NaN.
        """
        shard = tiled_shard(logits_NP.shape[1], self.noise, group)
        z_M, counters = zt_BS.flatten()[at_M], self.counters(at_M, zt_BS.shape[1])
        rows = (logits_NP, index_M)
        nucleus = None
        if self.top_p < 1:
            nucleus = find_nucleus(*rows, shard, self.temperature, self.top_p, group)
        share_3M = self.draw(*rows, z_M, counters, shard, self.temperature, nucleus)
        shares_R3M = gather_ranks(share_3M, group)
        key_M, token_M = winner_of_ranks(shares_R3M)
        component_M = _jump_uniforms(counters)[1]
        new_M = torch.where(component_M < self.alpha_s, token_M, self._noise_ids(counters, component_M))
        floor = self.noise.floor(self.alpha_t, 1 - self.alpha_t)
        signal_M = shares_R3M[:, 2].amax(0) - exponential(*counters.words(TOKEN_DRAW)[:2]).log2()
        return torch.where(self.noise.is_mask(z_M) | (signal_M < key_M + floor.log2()), new_M, z_M)

    def counters(self, at_M: Tensor, S: int) -> Counters:
        """Of the flat positions at_M in [B, S]."""
        return Counters(self.key, self.step, at_M % S, self.row_B[at_M // S])

    def _noise_ids(self, counters: Counters, component_M: Tensor) -> Tensor:
        uniform_M = bounded_int(counters.words(NOISE_DRAW)[0], self.noise.vocab_size)
        if self.noise.mask_id is None:
            return uniform_M
        threshold = self.alpha_s + (1 - self.alpha_s) * self.noise.uniform_ratio
        return torch.where(component_M < threshold, uniform_M, self.noise.mask_id)


def _jump_uniforms(counters: Counters) -> tuple[Tensor, Tensor]:
    """float64 [M] twice: decides whether a position may jump, decides the component."""
    w0, w1, w2, w3 = counters.words(JUMP_DRAW)
    return unit_interval(w0, w1), unit_interval(w2, w3)
