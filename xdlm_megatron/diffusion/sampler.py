"""Ancestral sampling: the reverse process from noise to text, by the draws of posterior_draw.py.

Before each network call random numbers decide which positions could change at all; the network's output is
asked for those alone. What it is asked through is `Prediction`, so that a model may keep its output head,
and the rest of its vocabulary, to itself.

Shape suffixes: B batch, S sequence, V vocabulary, N rows of logits, M positions at work, P vocabulary shard.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Key
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.posterior_draw import DrawShard, ReverseStep, draw_shard
from xdlm_megatron.diffusion.schedule import Schedule
from xdlm_megatron.diffusion.shard_rows import best_shard, tiled_shard, winner_of_ranks
from xdlm_megatron.diffusion.vocab_parallel import gather_ranks

Pick = Callable[[Tensor, Tensor, Tensor, dist.ProcessGroup | None], Tensor]
OnStep = Callable[[int, int, float, Tensor], None]
FINALS = ("ancestral", "greedy", "none")


class Prediction(Protocol):
    """What a network made of z_t."""

    def replace(self, ids_BS: Tensor, chosen_BS: Tensor, pick: Pick) -> Tensor:
        """ids_BS with the ids at chosen_BS, bool, replaced by picked ones; the same on every process.

        pick(at_M, logits_NP, index_M, group) -> ids int64 [M]: at_M are flat positions in [B, S]; row
        index_M[i] of logits_NP belongs to at_M[i] and holds this rank's columns, group is the ranks that
        share the vocabulary. It may be called for some positions at a time.
        """
        ...


class Logits:
    """A prediction that is a tensor: logits [B, S, >= V]."""

    def __init__(self, logits_BSV: Tensor) -> None:
        self.logits_NV = logits_BSV.reshape(-1, logits_BSV.shape[-1])

    def replace(self, ids_BS: Tensor, chosen_BS: Tensor, pick: Pick) -> Tensor:
        at_M = chosen_BS.flatten().nonzero()[:, 0]
        ids_N = ids_BS.flatten().clone()
        ids_N[at_M] = pick(at_M, self.logits_NV, at_M, None)
        return ids_N.view_as(ids_BS)


Denoise = Callable[[Tensor], Tensor | Prediction]


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
    draw: DrawShard = draw_shard,
) -> Tensor:
    """Run the reverse process from prior_BS (int64 ids) over num_steps equal steps of t from 1 to t_end;
    int64 [B, S].

    denoise: zt_BS -> logits [B, S, >= V], or a Prediction, called once a step. final: the noise removal
    call after the last step, "ancestral" (alpha_s = 1), "greedy" (argmax at every free position) or "none"
    (noise may be left). clamp: ids [B, S] of observed positions, -1 where free; they never change.
    temperature and top_p reshape p before the posterior; top-p keeps the most probable token and those whose
    cumulative mass stays within top_p. row_id_B: int64 [B] in [0, 2^32), names the rows for the random
    numbers (default 0..B-1), so that a row does not depend on its batch. on_step(call, num_calls, t, zs_BS):
    called after every network call with the time reached. draw: what reads the logits. Raises ValueError on
    values outside these rules.
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
        reverse = ReverseStep(key, step, row_B, noise, alpha_s, alpha_t, temperature, top_p, draw)
        zs_BS, undecided_BS = reverse.settle(zt_BS, free_BS)
        zt_BS = _predict(denoise, zt_BS).replace(zs_BS, undecided_BS, partial(reverse.pick, zt_BS))
        if on_step is not None:
            on_step(step, num_calls, float(times[step + 1]), zt_BS)
    if final == "greedy":
        zt_BS = _predict(denoise, zt_BS).replace(zt_BS, free_BS, partial(most_probable, noise))
        if on_step is not None:
            on_step(num_steps, num_calls, 0.0, zt_BS)
    return zt_BS


def _predict(denoise: Denoise, zt_BS: Tensor) -> Prediction:
    output = denoise(zt_BS)
    return Logits(output) if isinstance(output, Tensor) else output


def most_probable(
    noise: StationaryNoise,
    at_M: Tensor,
    logits_NP: Tensor,
    index_M: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The likeliest ids [M], the lowest of equals; after `noise`, a pick of Prediction. ValueError on NaN."""
    shard = tiled_shard(logits_NP.shape[1], noise, group)
    return winner_of_ranks(gather_ranks(best_shard(logits_NP, index_M, shard), group))[1]


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
