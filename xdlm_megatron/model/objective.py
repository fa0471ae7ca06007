"""One forward step for Megatron's pipeline schedules: z_t -> logits -> NELBO sums and token counts.

Shapes: B micro-batch, S sequence, H hidden, P vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from xdlm_megatron.diffusion.head_nelbo import fusing_pays, head_nelbo
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo
from xdlm_megatron.model.build import unwrap
from xdlm_megatron.parallel.mesh import Mesh

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


class NoisedBatch(Protocol):
    """What the objective reads of a micro-batch (data/batch.py)."""

    x0_BS: Tensor
    zt_BS: Tensor
    alpha_BS: Tensor
    beta_BS: Tensor
    dalpha_BS: Tensor
    scored_BS: Tensor
    document_BT: Tensor | None


@dataclass(frozen=True)
class Objective:
    """The negative ELBO per token, as `forward_step_func` of Megatron's schedules.

    Of an autoregressive model, the cross-entropy of the next token: its noise is that of uniform_ratio 0.

    fuse_head: the model stops before its head; the loss goes on from there and never makes the logits.
    "auto": where that pays.
    ops: who does the loss's work on rows of logits.
    """

    noise: StationaryNoise
    mesh: Mesh
    fuse_head: Literal["auto", "always", "never"] = field(default="auto", kw_only=True)
    ops: RowOps = field(default=REFERENCE, kw_only=True)

    def forward_step(self, batches: Iterator[NoisedBatch], model: Any) -> tuple[Tensor, LossFunction]:
        """Runs one micro-batch; the loss function is called on the last pipeline stage only."""
        seen_BS, batch = seen_and_asked(next(batches), model, self.noise)
        fuse_head = self._fuses_head(batch, model)

        def loss_function(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            weight_PH = unwrap(model).head_weight() if fuse_head else None
            nelbo_BS = self.nelbo(output, batch, weight_PH)
            report = self.report(nelbo_BS.detach(), batch)
            return nelbo_BS.sum(), report["tokens_per_sequence"].sum(dtype=torch.int), report

        return model(seen_BS, batch.document_BT, fuse_head), loss_function

    @property
    def reports(self) -> dict[str, tuple[int, ...]]:
        """Names of what is reported of each sequence, and its shape."""
        return {"nelbo_per_sequence": (), "tokens_per_sequence": ()}

    def report(self, nelbo_BS: Tensor, batch: NoisedBatch) -> dict[str, Tensor]:
        """{name: [B, *shape]} of `reports`; sums, and counts as int32."""
        tokens_B = batch.scored_BS.sum(dim=1, dtype=torch.int)
        return {"nelbo_per_sequence": nelbo_BS.sum(dim=1), "tokens_per_sequence": tokens_B}

    def _fuses_head(self, batch: NoisedBatch, model: Any) -> bool:
        chunk = unwrap(model)
        if self.fuse_head != "auto" or not chunk.post_process:
            return self.fuse_head == "always"
        tokens, P = batch.zt_BS.numel(), len(chunk.head_weight())
        return fusing_pays(tokens, P, self.noise, batch.zt_BS.device.type)

    def nelbo(self, output: Tensor, batch: NoisedBatch, weight_PH: Tensor | None = None) -> Tensor:
        """[B, S] nats per unit of t, of logits [S, B, P], or of hidden [S, B, H] and the head's weight.

        The gradient of logits takes their place in memory.
        """
        output = output.transpose(0, 1)  # a view: the loss works in Megatron's [S, B, .] order
        tokens = (batch.zt_BS, batch.x0_BS, batch.alpha_BS, batch.beta_BS, batch.dalpha_BS, self.noise)
        tp = self.mesh.groups.tp
        group = tp if tp.size() > 1 else None
        if weight_PH is not None:
            main_grad_PH = _float32_main_grad(weight_PH)
            return head_nelbo(
                output, weight_PH, *tokens, group=group, ops=self.ops, main_grad_PH=main_grad_PH
            )
        in_place = torch.is_grad_enabled()
        return vocab_parallel_nelbo(output, *tokens, group=group, grad_in_place=in_place, ops=self.ops)


def seen_and_asked(batch: Any, model: Any, noise: StationaryNoise) -> tuple[Tensor, NoisedBatch]:
    """What the model reads [B, S] of a batch, and the batch that its loss is of.

    An autoregressive model reads x0, and its loss is the NELBO of nothing but masks, each with weight 1:
    without uniform noise a mask's loss is -dalpha / beta times -log p of its token (nelbo.py).
    """
    if not unwrap(model).autoregressive:
        return batch.zt_BS, batch
    zero_BS = torch.zeros_like(batch.alpha_BS)
    asked = replace(
        batch,
        zt_BS=torch.full_like(batch.zt_BS, noise.mask_id),
        alpha_BS=zero_BS,
        beta_BS=zero_BS + 1,
        dalpha_BS=-batch.scored_BS.to(zero_BS.dtype),
    )
    return batch.x0_BS, asked


def _float32_main_grad(weight: Tensor) -> Tensor | None:
    """Where Megatron's data-parallel wrapper sums this weight's gradients, if it does and in float32.

    It adds the gradient that autograd gives the weight, if any (a tied embedding has one), to what lies
    there already; overlapping the reduction with backward would need one in any case, and is off.
    """
    main_grad = getattr(weight, "main_grad", None)
    return main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None
