"""A draw from the reverse step of posterior.py that reads the logits of a few rows, once, and no posterior.

Three stages, for positions at z on the way from t to s:

0. `ReverseStep.settle` needs random numbers alone. Most positions stay whatever the network says
   (jump_bound); a mask that jumps to a uniform id or to the mask again is finished too. The rest need logits.
1. A race (token_race.py, nucleus_draw.py) gives three numbers a row: a token of p, its key, the logit of z.
2. `ReverseStep.pick` decides by them whether z leaves at all.

A visible z is signal with probability p_z / (p_z + c): that is the race of a clock of rate 2^x_z against one
of rate c sum(2^x), and the second has already been run, since the winner's time is exponential of rate
sum(2^x). So z stays if x_z - log2(E') >= key + log2(c), with one more exponential E'. There is no sum over
the vocabulary.

Shape suffixes: B batch, S sequence, N rows of logits, M rows at work, P vocabulary shard, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Key, bounded_int, unit_interval
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.nucleus_draw import draw_tokens
from xdlm_megatron.diffusion.posterior import jump_bound
from xdlm_megatron.diffusion.shard_rows import tiled_shard
from xdlm_megatron.diffusion.token_race import (
    JUMP_DRAW,
    NOISE_DRAW,
    REFERENCE_DRAW,
    STAY_DRAW,
    ChosenRows,
    Counters,
    Draw,
    exponential,
)


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
        draw: Draw = REFERENCE_DRAW,
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
        this with the same positions and gets the same ids. Raises ValueError on what is not finite.
        """
        shard = tiled_shard(logits_NP.shape[1], self.noise, group)
        z_M, counters = zt_BS.flatten()[at_M], self.counters(at_M, zt_BS.shape[1])
        chosen = ChosenRows(logits_NP, index_M, z_M, counters, shard, self.temperature)
        key_M, token_M, x_M = draw_tokens(self.draw, chosen, self.top_p, group)
        component_M = _jump_uniforms(counters)[1]
        new_M = torch.where(component_M < self.alpha_s, token_M, self._noise_ids(counters, component_M))
        floor = self.noise.floor(self.alpha_t, 1 - self.alpha_t)
        signal_M = x_M - exponential(*counters.words(STAY_DRAW)[:2]).log2()
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
