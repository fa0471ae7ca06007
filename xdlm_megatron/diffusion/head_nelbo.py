"""Output head and loss in one: hidden states and the head's weight to the NELBO, some tokens at a time.

A chunk of C tokens is multiplied with the weight, its loss and the gradient of its logits are taken as in
vocab_parallel.py, and the gradient goes straight on into those of the hidden states and of the weight. The
logits of all tokens never exist; [C, P] is the largest buffer.

That is done in forward, for an upstream gradient of 1: three matrix products, as many as without fusion. The
backward pass scales the two gradients where every token's upstream gradient is the same number (a sum of
losses, scaled or not). Where it is not, or where backward is called again, it repeats the product with the
weight and multiplies each token's own upstream gradient in before the sum over tokens: four products.

The weight's gradient is a float32 sum over chunks. Where the caller has such a sum already (Megatron's
main_grad), forward adds to it, and no [P, H] tensor is made. What is in there cannot be scaled any more, so
the upstream gradient must be 1.

Only tokens that have a loss are multiplied, in every product: at k = 0 the masked ones, and never those with
dalpha = 0.

Shape suffixes: B batch, S sequence, H hidden, P vocabulary shard, N tokens in the hidden states' storage
order, C tokens of a chunk, M tokens that have a loss.
"""

import functools
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
    opaque_to_compile,
    shard_nelbo,
    shard_of,
    to_rows,
    to_tokens,
)

# Elements of a chunk's logits: long enough products, and little beside the weight's gradient.
CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 27}
# Elements of a 16-bit product on its way into a float32 sum.
TILE_ELEMENTS = 1 << 22


@opaque_to_compile
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
    main_grad_PH: Tensor | None = None,
) -> Tensor:
    """vocab_parallel_nelbo(hidden_BSH @ weight_PH.T, ...) without the logits: [B, S] nats, >= 0, equal on
    every rank.

    hidden_BSH: the whole sequence, the same on every rank, contiguous or the transpose of a contiguous
    [S, B, H]. weight_PH: this rank's rows of the head, of hidden's dtype. group: the tensor-parallel group.
    chunk_tokens: tokens whose logits exist at once; None: as CHUNK_ELEMENTS allows. The rest as there; a
    token with dalpha = 0 may have hidden states of NaN.

    main_grad_PH: float32, the caller's sum of the weight's gradients. Forward adds this batch's for an
    upstream gradient of 1, and autograd gets none for the weight; backward raises ValueError on any other
    upstream gradient. So backward must follow every forward under autograd, by a plain sum of the losses.

    The gradient of hidden_BSH is this rank's share, as that of any column-parallel product: the caller sums
    it over the group (all-reduce, or reduce-scatter with sequence parallelism). Rows of the weight that
    belong to the mask or to padding get gradient 0.

    Raises ValueError as vocab_parallel_nelbo does, on chunk_tokens < 1, and on a main_grad_PH of another
    shape or dtype.
    """
    P = weight_PH.shape[0]
    check_shards(P, noise, group)
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_ELEMENTS.get(hidden_BSH.device.type, 1 << 27) // P)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1; None chooses it")
    if main_grad_PH is not None and (main_grad_PH.shape, main_grad_PH.dtype) != (
        weight_PH.shape,
        torch.float32,
    ):
        raise ValueError(
            f"main_grad_PH of shape {tuple(main_grad_PH.shape)} and {main_grad_PH.dtype} must be float32 of "
            f"the weight's shape {tuple(weight_PH.shape)}"
        )
    with_grad = torch.is_grad_enabled() and (hidden_BSH.requires_grad or weight_PH.requires_grad)
    transposed = is_transposed(hidden_BSH)
    tokens = to_tokens(zt_BS, x0_BS, alpha_B, beta_B, dalpha_B, compute_dtype(hidden_BSH), transposed)
    plan = _Plan(tokens, shard_of(P, noise, group), group, transposed, chunk_tokens, ops, main_grad_PH)
    return from_rows(_HeadNelbo.apply(hidden_BSH, weight_PH, plan, with_grad), zt_BS.shape, transposed)


def fusing_pays(tokens: int, P: int, noise: StationaryNoise, device_type: str) -> bool:
    """Whether head_nelbo is the better way for so many tokens and columns.

    At k = 0 it is, for unmasked tokens skip the head. Else it saves memory where the logits are more than one
    chunk, in 1.09 times the CPU time in bfloat16 (benchmarks/results/cpu/head_loss_bfloat16.md); where
    they are not there is nothing to save.
    """
    return noise.uniform_ratio == 0 or tokens * P > CHUNK_ELEMENTS.get(device_type, 1 << 27)


@dataclass(frozen=True)
class _Plan:
    """All but the two factors of the product."""

    tokens: Tokens
    shard: Shard
    group: dist.ProcessGroup | None
    transposed: bool
    chunk_tokens: int
    ops: RowOps
    main_grad_PH: Tensor | None

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
    """Of hidden states and weight, filled chunk by chunk; needs: which of the two. The weight's is added to
    main_grad_PH, or to a new sum in the loss's dtype.
    """

    def __init__(self, head: _Head, plan: _Plan, needs: tuple[bool, bool]) -> None:
        self.hidden_NH = torch.zeros_like(head.hidden_NH) if needs[0] else None
        self.weight_PH = plan.main_grad_PH if needs[1] else None
        if needs[1] and self.weight_PH is None:
            self.weight_PH = torch.zeros_like(head.weight_PH, dtype=plan.tokens.alpha_N.dtype)

    def add(self, head: _Head, rows: Any, grad_CP: Tensor) -> None:
        """One chunk, by the gradient of its logits."""
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = grad_CP @ head.weight_PH
        if self.weight_PH is not None:
            _add_product(self.weight_PH, grad_CP, head.hidden_NH[rows])


def _add_product(sum_PH: Tensor, grad_CP: Tensor, hidden_CH: Tensor) -> None:
    """sum += grad.T @ hidden."""
    if sum_PH.dtype == grad_CP.dtype:
        sum_PH.addmm_(grad_CP.t(), hidden_CH)
    elif _sums_in_float32(grad_CP.device.type, grad_CP.dtype):
        torch.ops.aten.addmm.dtype_out(sum_PH, grad_CP.t(), hidden_CH, torch.float32, out=sum_PH)
    else:
        size = max(1, TILE_ELEMENTS // hidden_CH.shape[1])
        for sum_TH, grad_CT in zip(sum_PH.split(size), grad_CP.split(size, dim=1), strict=True):
            sum_TH += grad_CT.t() @ hidden_CH


@functools.cache
def _sums_in_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit matrices to a float32 one in place: tried, once."""
    a, total = (
        torch.full((16, 16), 0.5, dtype=dtype, device=device_type),
        torch.ones(16, 16, device=device_type),
    )
    try:
        torch.ops.aten.addmm.dtype_out(total, a.t(), a, torch.float32, out=total)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((total == 5).all())


class _HeadNelbo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BSH: Tensor, weight_PH: Tensor, plan: _Plan, with_grad: bool) -> Tensor:
        tokens, shard, ops = plan.tokens, plan.shard, plan.ops
        head = _Head(hidden_BSH, weight_PH, plan)
        loss_N = torch.zeros_like(tokens.alpha_N)
        terms_6N = loss_N.new_zeros(6, len(tokens))
        gradients = _Gradients(head, plan, ctx.needs_input_grad[:2]) if with_grad else None
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
    @opaque_to_compile
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BSH, weight_PH, terms_6N = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad[:2]
        gradients, ctx.gradients = ctx.gradients, None
        if not bool((upstream_N == 1).all()):
            if needs[1] and plan.main_grad_PH is not None:
                raise ValueError(_not_one(upstream_N))
            gradients = _scaled(gradients, upstream_N)
        if gradients is None:
            gradients = _recompute(hidden_BSH, weight_PH, terms_6N, plan, upstream_N, needs)
        own = needs[1] and plan.main_grad_PH is None
        grad_PH = gradients.weight_PH.to(weight_PH.dtype) if own else None
        if gradients.hidden_NH is None:
            return None, grad_PH, None, None
        B, S, H = hidden_BSH.shape
        shape = (S, B, H) if plan.transposed else (B, S, H)
        grad_BSH = gradients.hidden_NH.view(shape)
        return grad_BSH.transpose(0, 1) if plan.transposed else grad_BSH, grad_PH, None, None


def _not_one(upstream_N: Tensor) -> str:
    other = upstream_N[upstream_N != 1][0].item()
    return (
        f"head_nelbo with main_grad_PH got an upstream gradient of {other:.6g} and can take 1 alone, for "
        "forward has already added the weight's gradient; call backward on the plain sum of the losses and "
        "scale main_grad afterwards, or leave main_grad_PH out (train.fuse_head=never leaves out all of it)"
    )


def _scaled(gradients: _Gradients | None, upstream_N: Tensor) -> _Gradients | None:
    """Forward's gradients times the upstream gradient; None if it differs or they are gone."""
    factor = upstream_N[0]
    if gradients is None or not bool(((upstream_N == factor) & (factor != 0)).all()):
        return None
    for x in (gradients.hidden_NH, gradients.weight_PH):
        if x is not None:
            x.mul_(factor)
    return gradients


def _recompute(
    hidden_BSH: Tensor,
    weight_PH: Tensor,
    terms_6N: Tensor,
    plan: _Plan,
    upstream_N: Tensor,
    needs: tuple[bool, bool],
) -> _Gradients:
    """The gradients for any upstream gradient, from the logits made again."""
    head = _Head(hidden_BSH, weight_PH, plan)
    gradients = _Gradients(head, plan, needs)
    for rows in plan.chunks():
        logits_CP, tokens_C = head.logits(rows), plan.tokens[rows]
        plan.ops.grad(logits_CP, tokens_C, terms_6N[:, rows], upstream_N[rows], plan.shard, logits_CP)
        gradients.add(head, rows, logits_CP)
    return gradients
