"""Ancestral sampling by the mixture draw of posterior.py: no [B, S, V] posterior is formed.

Each step draws, from a counter-based generator, whether a position may jump at all (a bound that does not
need the network), then which component it jumps to; a row of the vocabulary is normalised only where p_z or
a token of p is wanted. Tokens come from inverse-CDF sampling in float64 with one 53-bit uniform: a float32
race over the vocabulary truncates the tail of its noise and so lowers the temperature (arXiv 2409.02908), a
float64 one is exact as well but spends V random numbers where one does.

Shape suffixes: B batch, S sequence, V vocabulary, N positions at work.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Key, bounded_int, philox, unit_interval
from xdlm_megatron.diffusion.nelbo import log_probabilities
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.posterior import jump_bound, mixture_weights
from xdlm_megatron.diffusion.schedule import Schedule

Denoise = Callable[[Tensor], Tensor]
OnStep = Callable[[int, int, float, Tensor], None]
FINALS = ("ancestral", "greedy", "none")
ROW_ELEMENTS = 1 << 22  # float64 elements of one slice of vocabulary rows
JUMP_DRAW, TOKEN_DRAW = 0, 1


@torch.no_grad()
def sample(
    denoise: Denoise,
    prior_BS: Tensor,
    schedule: Schedule,
    num_steps: int,
    noise: StationaryNoise,
    key: Key,
    clamp: Tensor | None = None,
    *,
    final: Literal["ancestral", "greedy", "none"] = "ancestral",
    t_end: float = 1e-5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    row_id_B: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run the reverse process from prior_BS (int64 ids) over num_steps equal steps of t from 1 to t_end;
    int64 [B, S].

    denoise: zt_BS -> logits [B, S, >= V], called once a step. final: the noise removal call after the last
    step, "ancestral" (alpha_s = 1), "greedy" (argmax at every free position) or "none" (noise may be left).
    clamp: ids [B, S] of observed positions, -1 where free; they never change. temperature and top_p reshape
    p before the posterior; top-p keeps the most probable token and those whose cumulative mass stays within
    top_p. row_id_B: int64 [B] in [0, 2^32), names the rows for the random numbers (default 0..B-1), so that
    a row does not depend on its batch. on_step(call, num_calls, t, zs_BS): called after every network call
    with the time reached. Raises ValueError on values outside these rules.
    """
    _check(num_steps, final, t_end, temperature, top_p)
    times = torch.linspace(1, t_end, num_steps + 1, dtype=torch.float64)
    alphas = schedule.alpha(times)
    if final == "ancestral":
        times, alphas = torch.cat([times, times.new_zeros(1)]), torch.cat([alphas, alphas.new_ones(1)])
    num_calls = num_steps + (final != "none")
    row_B = torch.arange(prior_BS.shape[0], device=prior_BS.device) if row_id_B is None else row_id_B
    free_BS = torch.ones_like(prior_BS, dtype=torch.bool) if clamp is None else clamp < 0
    zt_BS = prior_BS if clamp is None else torch.where(free_BS, prior_BS, clamp)
    for step, (alpha_t, alpha_s) in enumerate(pairwise(alphas)):
        jumper = Jumper(key, step, row_B, noise, alpha_s, alpha_t, temperature, top_p)
        may_jump_BS = jumper.may_jump(zt_BS) & free_BS  # decided before the network is asked
        zt_BS = jumper.jump(denoise(zt_BS), zt_BS, may_jump_BS)
        if on_step is not None:
            on_step(step, num_calls, float(times[step + 1]), zt_BS)
    if final == "greedy":
        best_BS = log_probabilities(denoise(zt_BS), noise).argmax(-1)
        zt_BS = torch.where(free_BS, best_BS, zt_BS)
        if on_step is not None:
            on_step(num_steps, num_calls, 0.0, zt_BS)
    return zt_BS


class Jumper:
    """One reverse step from t to s: which positions leave their value, and for what."""

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
    ) -> None:
        """alpha_s, alpha_t: float64 scalars. The random numbers' counter is (position, step, row, draw)."""
        self.key, self.step, self.row_B, self.noise = key, step, row_B, noise
        self.alpha_s, self.alpha_t = alpha_s.to(row_B.device), alpha_t.to(row_B.device)
        self.temperature, self.top_p = temperature, top_p

    def may_jump(self, zt_BS: Tensor) -> Tensor:
        """bool [B, S]: positions that the network could move; the others stay whatever it says."""
        bound = jump_bound(self.alpha_s, self.alpha_t)
        may_jump_BS = self._uniforms(zt_BS)[0] < bound
        return may_jump_BS if self.noise.uniform_ratio > 0 else may_jump_BS & self.noise.is_mask(zt_BS)

    def jump(self, logits_BSV: Tensor, zt_BS: Tensor, may_jump_BS: Tensor) -> Tensor:
        """z_s, [B, S], given the logits at z_t; positions outside may_jump keep their value."""
        chosen_N = may_jump_BS.reshape(-1).nonzero()[:, 0]
        jump_N, component_N = (u.reshape(-1)[chosen_N] for u in self._uniforms(zt_BS))
        token_word, token_low, uniform_word, _ = self._words(zt_BS, TOKEN_DRAW)
        u_token_N = unit_interval(token_word, token_low).reshape(-1)[chosen_N]
        uniform_N = bounded_int(uniform_word, self.noise.vocab_size).reshape(-1)[chosen_N]
        zs_N, logits_NV = zt_BS.reshape(-1).clone(), logits_BSV.reshape(-1, logits_BSV.shape[-1])
        rows = max(1, ROW_ELEMENTS // logits_NV.shape[1])
        for start in range(0, chosen_N.numel(), rows):
            part = slice(start, start + rows)
            z_N, where_N = zs_N[chosen_N[part]], chosen_N[part]
            p_NV = token_law(logits_NV[where_N], self.noise, self.temperature, self.top_p)
            p_z_N = p_NV.gather(1, z_N[:, None])[:, 0]
            stay_N = mixture_weights(p_z_N, z_N, self.alpha_s, self.alpha_t, self.noise)[0]
            new_N = torch.where(
                component_N[part] < self.alpha_s,
                inverse_cdf(p_NV, u_token_N[part]),
                self._noise_ids(component_N[part], uniform_N[part]),
            )
            zs_N[where_N] = torch.where(jump_N[part] < 1 - stay_N, new_N, z_N)
        return zs_N.view_as(zt_BS)

    def _noise_ids(self, component_N: Tensor, uniform_N: Tensor) -> Tensor:
        if self.noise.mask_id is None:
            return uniform_N
        threshold = self.alpha_s + (1 - self.alpha_s) * self.noise.uniform_ratio
        return torch.where(component_N < threshold, uniform_N, self.noise.mask_id)

    def _uniforms(self, zt_BS: Tensor) -> tuple[Tensor, Tensor]:
        """float64 [B, S] twice: decides whether a position jumps, decides the component."""
        w0, w1, w2, w3 = self._words(zt_BS, JUMP_DRAW)
        return unit_interval(w0, w1), unit_interval(w2, w3)

    def _words(self, zt_BS: Tensor, draw: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        position_S = torch.arange(zt_BS.shape[1], device=zt_BS.device)
        return philox(self.key, (position_S, self.step, self.row_B[:, None], draw))


def token_law(
    logits_NV: Tensor, noise: StationaryNoise, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """p over the clean token, float64 [N, V]: mask and padding at 0, tempered, cut to the nucleus, summing
    to 1.
    """
    p_NV = log_probabilities(logits_NV.to(torch.float64) / temperature, noise).exp()
    if top_p >= 1:
        return p_NV
    sorted_NV, order_NV = p_NV.sort(stable=True, dim=-1, descending=True)
    kept_NV = sorted_NV.cumsum(-1) <= top_p
    kept_NV[:, 0] = True
    p_NV = torch.zeros_like(p_NV).scatter(-1, order_NV, torch.where(kept_NV, sorted_NV, 0.0))
    return p_NV / p_NV.sum(-1, keepdim=True)


def inverse_cdf(p_NV: Tensor, u_N: Tensor) -> Tensor:
    """The id where the cumulative law passes u in [0, 1): int64 [N], never an id of probability 0."""
    cdf_NV = p_NV.cumsum(-1)
    total_N = cdf_NV[:, -1]
    target_N = torch.minimum(u_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(cdf_NV, target_N[:, None], right=True)[:, 0]


def _check(num_steps: int, final: str, t_end: float, temperature: float, top_p: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    if final not in FINALS:
        raise ValueError(f"final={final!r} must be one of {', '.join(FINALS)}")
    if not 0 < t_end < 1:
        raise ValueError(f"t_end={t_end} must be in (0, 1): beta is 0 at 0; the paper uses 1e-5")
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} must be positive; for the most probable token use final='greedy'"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; 1 keeps every token")
