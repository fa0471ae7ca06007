"""A strict bound on the negative log-likelihood of held-out text, with its error and its parts.

    -log p(x) <= prior + diffusion + reconstruction

diffusion: the NELBO density over t in (t_min, 1), whose mean is the paper's windowed figure.
reconstruction: -log p_theta(x0 | z_t) at t_min.
prior: KL(q(z_1 | x0) || pi) at uniform_ratio > 0, the same for every token. With mask noise alone that is
infinite, for alpha(1) > 0 shows a token in a thousand; the chain then starts one step earlier, at nothing but
masks, and the prior is what the network pays for that step.

Shape suffixes: B micro-batch, S sequence, N sequences, R rows, T bins of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from xdlm_megatron.config.samplers import AncestralSampler
from xdlm_megatron.data.batch import Batch
from xdlm_megatron.diffusion.nelbo import prior_kl
from xdlm_megatron.evaluation.nelbo import (
    NelboEvaluator,
    NelboResult,
    bits_per_byte,
    perplexity,
    ratio,
)
from xdlm_megatron.evaluation.records import Estimate
from xdlm_megatron.evaluation.steps import sampling_chain
from xdlm_megatron.model.objective import Objective

NUM_BINS = 20


@dataclass(frozen=True)
class Bound:
    """total: the strict bound; parts: prior, diffusion and reconstruction, or the chain's prior and steps.

    num_steps: of a discrete chain's bound; None in continuous time.
    """

    total: Estimate
    parts: Mapping[str, Estimate]
    bits_per_byte: float | None
    num_steps: int | None = None

    @property
    def perplexity(self) -> float:
        return perplexity(self.total.mean)


@dataclass(frozen=True)
class TimeBin:
    """A mean over the tokens with t in [start, end): the density, nats a token and unit of t, or a share."""

    start: float
    end: float
    value: Estimate
    num_tokens: int


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` finds on a text. window: the paper's figure, from the noise of bound's diffusion."""

    bound: Bound
    window: NelboResult
    by_time: list[TimeBin]
    discrete: Bound | None


def bin_of(t_BS: Tensor, t_min: float) -> Tensor:
    """int64 [B, S]: which of NUM_BINS equal parts of (t_min, 1) a time is in."""
    return ((t_BS - t_min) / (1 - t_min) * NUM_BINS).long().clamp(0, NUM_BINS - 1)


@dataclass(frozen=True)
class TimedObjective(Objective):
    """The objective, reporting where in time the nats are."""

    t_min: float = field(kw_only=True)

    @property
    def reports(self) -> dict[str, tuple[int, ...]]:
        return {**super().reports, "nats_by_time": (NUM_BINS,), "tokens_by_time": (NUM_BINS,)}

    def report(self, nelbo_BS: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As Objective's; nats_by_time and tokens_by_time float64 [B, T]."""
        bin_BS = bin_of(batch.t_BS, self.t_min)
        nothing_BT = torch.zeros(len(bin_BS), NUM_BINS, dtype=torch.float64, device=bin_BS.device)
        return {
            **super().report(nelbo_BS, batch),
            "nats_by_time": nothing_BT.scatter_add(1, bin_BS, nelbo_BS.double()),
            "tokens_by_time": nothing_BT.scatter_add(1, bin_BS, batch.scored_BS.double()),
        }


@dataclass(frozen=True)
class BoundEvaluator:
    """The strict bound by rows, times and noise of a NelboEvaluator, whose objective is a TimedObjective."""

    nelbo: NelboEvaluator
    discrete_steps: int | None = None

    def __call__(self, chunks: list[Any]) -> Evaluated:
        """All processes call it; all get the result."""
        samples, noise = self.nelbo.samples, self.nelbo.samples.noise
        terms = self.nelbo.terms(chunks)
        rows = terms.density()
        tokens_R = rows["tokens_per_sequence"]
        discrete = None
        if self.discrete_steps is not None:
            t_end = getattr(self.nelbo.config.sampling, "t_end", AncestralSampler.t_end)
            chain = sampling_chain(samples.schedule, noise, self.discrete_steps, t_end)
            prior = 0.0 if noise.uniform_ratio == 0 else float(prior_kl(chain.alphas_K[0], noise))
            steps_R = {"prior": prior * tokens_R, "steps": terms.steps(chain)}
            discrete = self._bound(steps_R, tokens_R, self.discrete_steps)
        bound = self._bound(terms.strict(rows), tokens_R)
        by_time = bins_of(rows["nats_by_time"], rows["tokens_by_time"], samples.t_min)
        return Evaluated(bound, self.nelbo.result(rows), by_time, discrete)

    def _bound(self, parts_R: dict[str, Tensor], tokens_R: Tensor, num_steps: int | None = None) -> Bound:
        mean = self.nelbo.per_sequence
        tokens_N = mean(tokens_R)
        parts = {name: ratio(mean(nats_R), tokens_N) for name, nats_R in parts_R.items()}
        total = ratio(mean(sum(parts_R.values(), torch.zeros_like(tokens_R))), tokens_N)
        return Bound(total, parts, bits_per_byte(total.mean, self.nelbo.bytes_per_token), num_steps)


def bins_of(sums_RT: Tensor, tokens_RT: Tensor, t_min: float) -> list[TimeBin]:
    """Sums per token in each bin that has any, float64 [R, NUM_BINS] both."""
    edges = torch.linspace(t_min, 1, NUM_BINS + 1, dtype=torch.float64).tolist()
    found = []
    for index, (start, end) in enumerate(pairwise(edges)):
        here_R = tokens_RT[:, index] > 0
        if here_R.any():
            value = ratio(sums_RT[here_R, index], tokens_RT[here_R, index])
            found.append(TimeBin(start, end, value, int(tokens_RT[:, index].sum())))
    return found
