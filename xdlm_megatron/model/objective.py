"""One forward step for Megatron's pipeline schedules: z_t -> logits -> NELBO sums and token counts.

Shapes: B micro-batch, S sequence, P vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo
from xdlm_megatron.parallel.mesh import Mesh

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


class NoisedBatch(Protocol):
    """What the objective reads of a micro-batch (data/batch.py)."""

    x0_BS: Tensor
    zt_BS: Tensor
    alpha_B: Tensor
    beta_B: Tensor
    dalpha_B: Tensor


@dataclass(frozen=True)
class Objective:
    """The negative ELBO per token, as `forward_step_func` of Megatron's schedules."""

    noise: StationaryNoise
    mesh: Mesh

    def forward_step(self, batches: Iterator[NoisedBatch], model: Any) -> tuple[Tensor, LossFunction]:
        """Runs one micro-batch; the loss function is called on the last pipeline stage only."""
        batch = next(batches)

        def loss_function(logits_SBP: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            nelbo_BS = self.nelbo(logits_SBP, batch)
            num_tokens = torch.tensor(nelbo_BS.numel(), dtype=torch.int, device=nelbo_BS.device)
            return nelbo_BS.sum(), num_tokens, {"nelbo_per_sequence": nelbo_BS.detach().sum(dim=1)}

        return model(batch.zt_BS), loss_function

    def nelbo(self, logits_SBP: Tensor, batch: NoisedBatch) -> Tensor:
        """[B, S] nats per unit of t. The gradient takes the logits' place in memory."""
        tp = self.mesh.groups.tp
        return vocab_parallel_nelbo(
            logits_SBP.transpose(0, 1),  # a view: the loss works in Megatron's [S, B, P] order
            batch.zt_BS,
            batch.x0_BS,
            batch.alpha_B,
            batch.beta_B,
            batch.dalpha_B,
            self.noise,
            group=tp if tp.size() > 1 else None,
            grad_in_place=torch.is_grad_enabled(),
        )
