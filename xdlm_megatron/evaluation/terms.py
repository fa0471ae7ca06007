"""The terms of the strict bound, estimated row by row; bound.py says what they are.

A row is a sample under one draw of noise. Rows come in groups that share a stratification of t: a whole
held-out set, or the draws of one request.

Shape suffix: R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdlm_megatron.data.batch import Batch, NoisedSamples
from xdlm_megatron.diffusion.nelbo import prior_kl
from xdlm_megatron.evaluation.rounds import Rounds
from xdlm_megatron.evaluation.steps import Chain, StepObjective, one_step
from xdlm_megatron.model.build import unwrap
from xdlm_megatron.model.objective import Objective


@dataclass(frozen=True)
class Terms:
    """num_strata rows in succession share the range of t; row i stands in stratum i modulo num_strata."""

    rounds: Rounds
    samples: NoisedSamples
    objective: Objective
    num_rows: int
    num_strata: int

    def density(self) -> dict[str, Tensor]:
        """What the objective reports of each row, {name: [R, ...]}: its mean over t is the paper's figure."""
        return self.reported(self.objective)

    def reported(self, objective: Any) -> dict[str, Tensor]:
        """What any objective (`forward_step`, `reports`) reports of each row, {name: [R, ...]}."""

        def build(rows: NDArray[np.int64]) -> Batch:
            return self.samples.build(rows, rows % self.num_strata, self.num_strata)

        return self.rounds.sums(objective.forward_step, build, self.num_rows, objective.reports)

    def strict(self, density: dict[str, Tensor]) -> dict[str, Tensor]:
        """prior, diffusion and reconstruction, nats [R] each, from what `density` returned.

        Of an autoregressive model, whose likelihood is exact, the next token's cross-entropy alone.
        """
        samples = self.samples
        if unwrap(self.rounds.chunks[0]).autoregressive:
            return {"next token": density["nelbo_per_sequence"]}
        ends = torch.tensor([samples.t_min, 1.0], dtype=torch.float64)
        alpha_0, alpha_1 = samples.schedule.alpha(ends).tolist()
        if samples.noise.uniform_ratio == 0:
            prior_R = self.steps(one_step(0.0, alpha_1))
        else:
            prior_R = float(prior_kl(alpha_1, samples.noise)) * density["tokens_per_sequence"]
        return {
            "prior": prior_R,
            "diffusion": (1 - samples.t_min) * density["nelbo_per_sequence"],
            "reconstruction": self.steps(one_step(alpha_0, 1.0)),
        }

    def steps(self, chain: Chain) -> Tensor:
        """[R] nats, unbiased for the sum of the chain's KLs."""
        objective = StepObjective(self.samples.noise, self.rounds.mesh, ops=self.objective.ops)
        found = self.rounds.sums(
            objective.forward_step,
            lambda rows: chain.build(self.samples, rows, rows % self.num_strata, self.num_strata),
            self.num_rows,
            objective.reports,
        )
        return chain.num_steps * found["nats"]
