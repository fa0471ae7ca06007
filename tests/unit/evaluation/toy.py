"""A network on two positions of three tokens and a mask: all 16 states can be enumerated, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray
from torch import Tensor

from tests.unit.model.small import small_config
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.batch import NoisedSamples
from xdlm_megatron.data.build import build_noise, build_schedule
from xdlm_megatron.data.sampler import SpreadIndex
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.nelbo import (
    finite_step_kl,
    log_probabilities,
    nelbo_density,
    prior_kl,
)
from xdlm_megatron.diffusion.posterior import posterior
from xdlm_megatron.model.build import build_model
from xdlm_megatron.parallel.mesh import Mesh

V, S, MASK = 4, 2, 3
STATES = torch.tensor(list(product(range(V), repeat=S)))
TEXTS = [x for x in product(range(V), repeat=S) if MASK not in x]
F64 = torch.float64


@dataclasses.dataclass
class Rows:
    """Samples that are given."""

    ids_NS: NDArray[np.int64]
    seq_length: int = S
    summary: str = "toy"

    def __len__(self) -> int:
        return len(self.ids_NS)

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        return self.ids_NS[index]


class Toy:
    """One random network at one uniform_ratio; what it is worth, exactly."""

    def __init__(
        self, mesh: Mesh, uniform_ratio: float, t_min: float = 1e-3, **sections: dict[str, Any]
    ) -> None:
        data = {"seq_length": S, "vocab_size": V, "mask_id": MASK, "make_vocab_size_divisible_by": 4}
        model = {
            "num_layers": 1,
            "zero_init_head": False,
            "init_method_std": 0.4,
            **sections.pop("model", {}),
        }
        self.config: RunConfig = small_config(
            data=data, model=model, diffusion={"uniform_ratio": uniform_ratio, "t_min": t_min}, **sections
        )
        self.noise, self.schedule = build_noise(self.config), build_schedule(self.config.diffusion)
        self.chunks = build_model(self.config, mesh)
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            self.logits_ZSV = self.chunks[0](STATES).transpose(0, 1).to(F64)  # Z: states
        assert self.logits_ZSV.std() > 0.3, "a network that says nothing would prove nothing"
        self.p_ZSV = log_probabilities(self.logits_ZSV, self.noise).exp()

    def samples(self, mesh: Mesh, texts: list[tuple[int, ...]] = TEXTS, seed: int = 3) -> NoisedSamples:
        rows = Rows(np.array(texts))
        return NoisedSamples(
            dataset=rows,
            index=SpreadIndex(len(rows), len(rows)),
            noise=self.noise,
            schedule=self.schedule,
            seed=seed,
            t_min=self.config.diffusion.t_min,
            streams=(Stream.EVAL_TIME, Stream.EVAL_NOISE),
            device=mesh.device,
        )

    def reached(self, x: tuple[int, ...], alpha: float, free: tuple[bool, ...] = (True,) * S) -> Tensor:
        """q(z_t | x) of every state; positions that are not free keep x."""
        law_SV = (1 - alpha) * self.noise.prior_law().expand(S, V).clone()
        law_SV[range(S), x] += alpha
        law_SV[[not f for f in free]] = 0.0
        for position in range(S):
            if not free[position]:
                law_SV[position, x[position]] = 1.0
        return torch.stack([law_SV[i][STATES[:, i]] for i in range(S)]).prod(0)

    def mean(self, x: tuple[int, ...], alpha: float, values_ZS: Tensor, free: tuple[bool, ...]) -> Tensor:
        """E over z_t of the free positions' values."""
        q_Z = self.reached(x, alpha, free)
        values_Z = (values_ZS * torch.tensor(free)).sum(1)
        return (q_Z * torch.where(q_Z > 0, values_Z, 0.0)).sum()

    def step(
        self, x: tuple[int, ...], alpha_t: float, alpha_s: float, free: tuple[bool, ...] = (True,) * S
    ) -> Tensor:
        """E of the KL of one step, nats."""
        x0_ZS = torch.tensor(x).expand_as(STATES)
        alphas = torch.tensor([alpha_s, alpha_t], dtype=F64)[:, None].expand(2, len(STATES))
        kl_ZS = finite_step_kl(self.logits_ZSV, STATES, x0_ZS, *alphas, self.noise)
        return self.mean(x, alpha_t, kl_ZS, free)

    def diffusion(self, x: tuple[int, ...], free: tuple[bool, ...] = (True,) * S) -> Tensor:
        """The NELBO density integrated over t in (t_min, 1), by Gauss-Legendre."""
        node, weight = (torch.tensor(values, dtype=F64) for values in leggauss(40))
        low = self.config.diffusion.t_min
        t_N, weight_N = low + (1 - low) * (node + 1) / 2, weight * (1 - low) / 2
        x0_ZS, total = torch.tensor(x).expand_as(STATES), torch.zeros((), dtype=F64)
        for t, w in zip(t_N, weight_N, strict=True):
            rates = (f(t).expand(len(STATES)) for f in (self.schedule.alpha, self.schedule.beta))
            slope = self.schedule.dalpha(t).expand(len(STATES))
            density_ZS = nelbo_density(self.logits_ZSV, STATES, x0_ZS, *rates, slope, self.noise)
            total += w * self.mean(x, float(self.schedule.alpha(t)), density_ZS, free)
        return total

    def bound(self, x: tuple[int, ...], free: tuple[bool, ...] = (True,) * S) -> Tensor:
        """The strict bound in continuous time, nats."""
        ends = torch.tensor([self.config.diffusion.t_min, 1.0], dtype=F64)
        alpha_0, alpha_1 = self.schedule.alpha(ends).tolist()
        start = (
            self.step(x, 0.0, alpha_1, free)
            if self.noise.uniform_ratio == 0
            else sum(free) * prior_kl(alpha_1, self.noise)
        )
        return start + self.diffusion(x, free) + self.step(x, alpha_0, 1.0, free)

    def discrete_bound(self, x: tuple[int, ...], alphas: Tensor) -> Tensor:
        """The bound of a chain, nats."""
        steps = sum(self.step(x, t, s) for t, s in pairwise(alphas.tolist()))
        prior = 0.0 if self.noise.uniform_ratio == 0 else S * prior_kl(alphas[0], self.noise)
        return prior + steps

    def chain_nll(self, alphas: Tensor) -> dict[tuple[int, ...], Tensor]:
        """-log p(x) of every text under the chain from the prior, its 16 x 16 transitions multiplied."""
        law_Z = self.noise.prior_law()[STATES].prod(1)
        for alpha_t, alpha_s in pairwise(alphas.tolist()):
            law_Z = law_Z @ self._transition(alpha_s, alpha_t)
        state_of = {tuple(state): index for index, state in enumerate(STATES.tolist())}
        return {x: -law_Z[state_of[x]].log() for x in TEXTS}

    def _transition(self, alpha_s: float, alpha_t: float) -> Tensor:
        alphas = (torch.full((len(STATES),), alpha, dtype=F64) for alpha in (alpha_s, alpha_t))
        law_ZSV = posterior(self.p_ZSV, STATES, *alphas, self.noise)
        columns: Iterator[Tensor] = (law_ZSV[:, i][:, STATES[:, i]] for i in range(S))
        return torch.stack(list(columns)).prod(0)
