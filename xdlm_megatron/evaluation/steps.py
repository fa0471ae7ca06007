"""Finite steps of a reverse chain as terms of a bound: the reconstruction, the start, and whole chains.

Shape suffixes: B micro-batch, S sequence, K transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdlm_megatron.data.batch import NoisedSamples
from xdlm_megatron.diffusion.counter_rng import split_id, uniform
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps
from xdlm_megatron.diffusion.schedule import Schedule
from xdlm_megatron.diffusion.step_kl import vocab_parallel_step_kl
from xdlm_megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepBatch:
    """A micro-batch at alpha_t, and each token's step from there to alpha_s; ids int64, alphas float64."""

    x0_BS: Tensor
    zt_BS: Tensor
    alpha_s_BS: Tensor
    alpha_t_BS: Tensor
    scored_BS: Tensor
    document_BT: Tensor | None


@dataclass(frozen=True)
class StepObjective:
    """The finite-step KL as `forward_step_func` of Megatron's schedules; it reports nats of each sequence."""

    reports: ClassVar[dict[str, tuple[int, ...]]] = {"nats": ()}

    noise: StationaryNoise
    mesh: Mesh
    ops: RowOps = field(default=REFERENCE, kw_only=True)

    def forward_step(
        self, batches: Iterator[StepBatch], model: Any
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        batch = next(batches)

        def loss_function(logits_SBP: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            tp = self.mesh.groups.tp
            kl_BS = vocab_parallel_step_kl(
                logits_SBP.transpose(0, 1),
                batch.zt_BS,
                batch.x0_BS,
                batch.alpha_s_BS,
                batch.alpha_t_BS,
                self.noise,
                group=tp if tp.size() > 1 else None,
                ops=self.ops,
            )
            nats_B = kl_BS.masked_fill(~batch.scored_BS, 0.0).sum(dim=1)
            return nats_B.sum(), batch.scored_BS.sum(dtype=torch.int), {"nats": nats_B}

        return model(batch.zt_BS, batch.document_BT), loss_function


@dataclass(frozen=True)
class Chain:
    """Transitions alphas_K[i] -> alphas_K[i + 1] of a reverse chain, float64, increasing.

    One of them is drawn for each row, stratified, so that K times its KL is unbiased for their sum.
    """

    alphas_K: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.alphas_K) - 1

    def build(
        self,
        samples: NoisedSamples,
        rows: NDArray[np.int64],
        strata: NDArray[np.int64],
        num_strata: int,
    ) -> StepBatch:
        """The samples of these ids with the noise of their streams."""
        time_stream, noise_stream = samples.streams
        clean = samples.clean(rows)
        low_B, high_B = split_id(clean.id_B)
        stratum_B = torch.from_numpy(strata).to(clean.id_B.device)
        u_B = (uniform((samples.seed, time_stream), (0, 0, low_B, high_B)) + stratum_B) / num_strata
        step_B = (u_B * self.num_steps).long()
        alphas_K = self.alphas_K.to(step_B.device)
        alpha_t_BS, alpha_s_BS = (
            alphas_K[step_B + after][:, None].expand(clean.x0_BS.shape) for after in (0, 1)
        )
        zt_BS = samples.corrupt(clean, alpha_t_BS, noise_stream)
        return StepBatch(clean.x0_BS, zt_BS, alpha_s_BS, alpha_t_BS, clean.scored_BS, clean.document_BT)


def one_step(alpha_t: float, alpha_s: float) -> Chain:
    """A chain of a single transition."""
    return Chain(torch.tensor([alpha_t, alpha_s], dtype=torch.float64))


def sampling_chain(schedule: Schedule, noise: StationaryNoise, num_steps: int, t_end: float = 1e-5) -> Chain:
    """The chain that ancestral sampling runs: num_steps equal steps of t from 1 to t_end, then noise removal.

    It starts from pure noise. With uniform noise its law at t = 1 is the prior, and the bound has the KL to
    it. With mask noise alone that KL is infinite, for alpha(1) > 0; but its transitions depend on
    (alpha_s - alpha_t) / (1 - alpha_t) only, hence are those of (alpha - alpha(1)) / (1 - alpha(1)), which
    ends in pure noise, and whose KL is 0.
    """
    alphas_K = schedule.alpha(torch.linspace(1, t_end, num_steps + 1, dtype=torch.float64))
    if noise.uniform_ratio == 0:
        alphas_K = (alphas_K - alphas_K[0]) / (1 - alphas_K[0])
    return Chain(torch.cat([alphas_K, alphas_K.new_ones(1)]))
