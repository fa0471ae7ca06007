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

from xdlm_megatron.config.schema import AncestralSampler
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
    """The density, nats per token and unit of t, averaged over the tokens with t in [start, end)."""

    start: float
    end: float
    density: Estimate
    num_tokens: int


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` finds on a text. window: the paper's figure, from the noise of bound's diffusion."""

    bound: Bound
    window: NelboResult
    by_time: list[TimeBin]
    discrete: Bound | None


@dataclass(frozen=True)
class TimedObjective(Objective):
    """The objective, reporting where in time the nats are."""

    t_min: float = field(kw_only=True)

    @property
    def reports(self) -> dict[str, tuple[int, ...]]:
        return {**super().reports, "nats_by_time": (NUM_BINS,), "tokens_by_time": (NUM_BINS,)}

    def report(self, nelbo_BS: Tensor, batch: Batch) -> dict[str, Tensor]:
        """As Objective's; nats_by_time and tokens_by_time float64 [B, T]."""
        bin_BS = ((batch.t_BS - self.t_min) / (1 - self.t_min) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
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
        return Evaluated(bound, self.nelbo.result(rows), self._by_time(rows), discrete)

    def _bound(self, parts_R: dict[str, Tensor], tokens_R: Tensor, num_steps: int | None = None) -> Bound:
        mean = self.nelbo.per_sequence
        tokens_N = mean(tokens_R)
        parts = {name: ratio(mean(nats_R), tokens_N) for name, nats_R in parts_R.items()}
        total = ratio(mean(sum(parts_R.values(), torch.zeros_like(tokens_R))), tokens_N)
        return Bound(total, parts, bits_per_byte(total.mean, self.nelbo.bytes_per_token), num_steps)

    def _by_time(self, rows: dict[str, Tensor]) -> list[TimeBin]:
        t_min = self.nelbo.samples.t_min
        edges = torch.linspace(t_min, 1, NUM_BINS + 1, dtype=torch.float64).tolist()
        found = []
        for index, (start, end) in enumerate(pairwise(edges)):
            nats_R, tokens_R = (rows[name][:, index] for name in ("nats_by_time", "tokens_by_time"))
            here_R = tokens_R > 0
            if here_R.any():
                density = ratio(nats_R[here_R], tokens_R[here_R])
                found.append(TimeBin(start, end, density, int(tokens_R.sum())))
        return found
