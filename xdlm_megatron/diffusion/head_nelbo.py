"""Output head and loss in one: hidden states and the head's weight to the NELBO, some tokens at a time.

A chunk of C tokens is multiplied with the weight, its loss and the gradient of its logits are taken as in
vocab_parallel.py, and the gradient goes straight on into those of the hidden states and of the weight. The
logits of all tokens never exist; [C, P] is the largest buffer.

That is done in forward, for an upstream gradient of 1: three matrix products, as many as without fusion. The
backward pass scales the two gradients where every token's upstream gradient is the same number (a sum of
losses, scaled or not). Where it is not, or where backward is called again, it repeats the product with the
weight and multiplies each token's own upstream gradient in before the sum over tokens: four products.

Only tokens that have a loss are multiplied, in every product: at k = 0 the masked ones, and never those with
dalpha = 0.

Shape suffixes: B batch, S sequence, H hidden, P vocabulary shard, N tokens in the hidden states' storage
order, C tokens of a chunk, M tokens that have a loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps, Shard, Tokens, compute_dtype
from xdlm_megatron.diffusion.vocab_parallel import (
    check_shards,
    from_rows,
    is_transposed,
    shard_nelbo,
    shard_of,
    to_rows,
    to_tokens,
)

# Elements of a chunk's logits: long enough products, and little beside the weight's gradient.
CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 27}


def head_nelbo(
    hidden_BSH: Tensor,
    weight_PH: Tensor,
    zt_BS: Tensor,
    x0_BS: Tensor,
    alpha_B: Tensor,
    beta_B: Tensor,
    dalpha_B: Tensor,
    noise: StationaryNoise,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    ops: RowOps = REFERENCE,
) -> Tensor:
    """vocab_parallel_nelbo(hidden_BSH @ weight_PH.T, ...) without the logits: [B, S] nats, >= 0, equal on
    every rank.

    hidden_BSH: the whole sequence, the same on every rank, contiguous or the transpose of a contiguous
    [S, B, H]. weight_PH: this rank's rows of the head, of hidden's dtype. group: the tensor-parallel group.
    chunk_tokens: tokens whose logits exist at once; None: as CHUNK_ELEMENTS allows. The rest as there; a
    token with dalpha = 0 may have hidden states of NaN.

    The gradient of hidden_BSH is this rank's share, as that of any column-parallel product: the caller sums
    it over the group (all-reduce, or reduce-scatter with sequence parallelism). Rows of the weight that
    belong to the mask or to padding get gradient 0. The weight's gradient is summed over chunks in float32.

    Raises ValueError as vocab_parallel_nelbo does, and on chunk_tokens < 1.
    """
    P = weight_PH.shape[0]
    check_shards(P, noise, group)
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_ELEMENTS.get(hidden_BSH.device.type, 1 << 27) // P)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1; None chooses it")
    with_grad = torch.is_grad_enabled() and (hidden_BSH.requires_grad or weight_PH.requires_grad)
    transposed = is_transposed(hidden_BSH)
    tokens = to_tokens(zt_BS, x0_BS, alpha_B, beta_B, dalpha_B, compute_dtype(hidden_BSH), transposed)
    plan = _Plan(tokens, shard_of(P, noise, group), group, transposed, chunk_tokens, ops)
    return from_rows(_HeadNelbo.apply(hidden_BSH, weight_PH, plan, with_grad), zt_BS.shape, transposed)


@dataclass(frozen=True)
class _Plan:
    """All but the two factors of the product."""

    tokens: Tokens
    shard: Shard
    group: dist.ProcessGroup | None
    transposed: bool
    chunk_tokens: int
    ops: RowOps

    def chunks(self) -> list[Any]:
        """Indices of the tokens that have a loss (known after a device sync): slices if all of them have."""
        N, C = len(self.tokens), self.chunk_tokens
        live_M = self.tokens.live(self.shard.noise).nonzero()[:, 0]
        if len(live_M) == N:
            return [slice(start, min(start + C, N)) for start in range(0, N, C)]
        return [tokens_C for tokens_C in live_M.split(C) if len(tokens_C)]


class _Head:
    """Hidden states and weight: the logits of a chunk, in one buffer for all of them."""

    def __init__(self, hidden_BSH: Tensor, weight_PH: Tensor, plan: _Plan) -> None:
        self.hidden_NH, self.weight_PH = to_rows(hidden_BSH, plan.transposed), weight_PH.detach()
        size = min(plan.chunk_tokens, len(plan.tokens))
        self.buffer_CP = self.hidden_NH.new_empty(size, len(self.weight_PH))

    def logits(self, rows: Any) -> Tensor:
        """[C, P], in the buffer."""
        hidden_CH = self.hidden_NH[rows]
        return torch.mm(hidden_CH, self.weight_PH.t(), out=self.buffer_CP[: len(hidden_CH)])


class _Gradients:
    """Of hidden states and weight, filled chunk by chunk. dtype is the loss's; needs: (hidden, weight)."""

    def __init__(self, head: _Head, dtype: torch.dtype, needs: tuple[bool, bool]) -> None:
        self.hidden_NH = torch.zeros_like(head.hidden_NH) if needs[0] else None
        self.weight_PH = torch.zeros_like(head.weight_PH, dtype=dtype) if needs[1] else None

    def add(self, head: _Head, rows: Any, grad_CP: Tensor) -> None:
        """One chunk, by the gradient of its logits."""
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = grad_CP @ head.weight_PH
        if self.weight_PH is None:
            return
        if self.weight_PH.dtype == grad_CP.dtype:
            self.weight_PH.addmm_(grad_CP.t(), head.hidden_NH[rows])
        else:
            self.weight_PH += grad_CP.t() @ head.hidden_NH[rows]

    def scaled(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """(hidden, weight) times a number, the latter in `dtype`; this object's own are used up."""
        if self.hidden_NH is not None:
            self.hidden_NH.mul_(factor)
        weight_PH = None if self.weight_PH is None else self.weight_PH.mul_(factor)
        return self.hidden_NH, None if weight_PH is None else weight_PH.to(dtype)


class _HeadNelbo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSH: Tensor, weight_PH: Tensor, plan: _Plan, with_grad: bool) -> Tensor:
        tokens, shard, ops = plan.tokens, plan.shard, plan.ops
        head = _Head(hidden_BSH, weight_PH, plan)
        loss_N = torch.zeros_like(tokens.alpha_N)
        terms_6N = loss_N.new_zeros(6, len(tokens))
        gradients = _Gradients(head, loss_N.dtype, ctx.needs_input_grad[:2]) if with_grad else None
        for rows in plan.chunks():
            logits_CP, tokens_C = head.logits(rows), tokens[rows]
            out_CP = None if gradients is None else logits_CP
            loss_N[rows], terms_6C = shard_nelbo(logits_CP, tokens_C, shard, plan.group, ops, out_CP)
            if gradients is not None:
                terms_6N[:, rows] = terms_6C
                gradients.add(head, rows, logits_CP)
        ctx.save_for_backward(hidden_BSH, weight_PH, terms_6N)
        ctx.plan, ctx.gradients = plan, gradients
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BSH, weight_PH, terms_6N = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        factor = upstream_N[0]
        if gradients is None or not bool(((upstream_N == factor) & (factor != 0)).all()):
            head = _Head(hidden_BSH, weight_PH, ctx.plan)
            gradients = _recompute(head, terms_6N, upstream_N, ctx.plan, ctx.needs_input_grad[:2])
            factor = torch.ones_like(factor)
        grad_NH, grad_PH = gradients.scaled(factor, weight_PH.dtype)
        if grad_NH is None:
            return None, grad_PH, None, None
        B, S, H = hidden_BSH.shape
        grad_BSH = grad_NH.view(S, B, H).transpose(0, 1) if ctx.plan.transposed else grad_NH.view(B, S, H)
        return grad_BSH, grad_PH, None, None


def _recompute(
    head: _Head, terms_6N: Tensor, upstream_N: Tensor, plan: _Plan, needs: tuple[bool, bool]
) -> _Gradients:
    """The gradients for an upstream gradient that differs between tokens, from the logits made again."""
    gradients = _Gradients(head, terms_6N.dtype, needs)
    for rows in plan.chunks():
        logits_CP, tokens_C = head.logits(rows), plan.tokens[rows]
        plan.ops.grad(logits_CP, tokens_C, terms_6N[:, rows], upstream_N[rows], plan.shard, logits_CP)
        gradients.add(head, rows, logits_CP)
    return gradients
