"""The loss of nelbo.py over a vocabulary split among ranks, with its analytic gradient and no float32 copy.

Rank r of the group owns the ids [r P, (r + 1) P), Megatron's rule. The logits are read three times, with the
row operations of row_ops.py: stats, sums (k > 0 only) and, in backward, grad. The upstream gradient is
multiplied in in float32, before the gradient's only rounding to the logits' dtype. Communication: one
all-gather of 16 bytes a token, one of 8 (k > 0 only), none in backward. Both are merged in rank order, so
that every rank gets the same bits; an all-reduce does not promise that.

torch.compile sees none of it: Inductor would unroll the passes' loop over rows and keep every step's scratch,
several float32 copies of the logits (tests/unit/diffusion/test_twin_memory.py). A compiled region breaks here
and goes on behind.

Shape suffixes: B batch, S sequence, P vocabulary shard, N tokens in the logits' storage order, R ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from xdlm_megatron.diffusion.nelbo import per_token
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps, Shard, Tokens, compute_dtype

# torch.compiler.disable, which would import Dynamo (1.3 s of CPU time) here instead of at the first call.
opaque_to_compile = _disable_dynamo


@opaque_to_compile
def vocab_parallel_nelbo(
    logits_BSP: Tensor,
    zt_BS: Tensor,
    x0_BS: Tensor,
    alpha_B: Tensor,
    beta_B: Tensor,
    dalpha_B: Tensor,
    noise: StationaryNoise,
    group: dist.ProcessGroup | None = None,
    grad_in_place: bool = False,
    ops: RowOps = REFERENCE,
) -> Tensor:
    """NELBO per token and unit of t: [B, S] nats, >= 0, float32 (float64 for float64 logits), equal on
    every rank.

    logits_BSP: this rank's columns, any float dtype, contiguous or the transpose of a contiguous [S, B, P].
    zt_BS, x0_BS: int64 global ids; x0 is never the mask. alpha_B, beta_B, dalpha_B: float [B] or
    broadcastable to [B, S]. group: the tensor-parallel group; None is one rank. grad_in_place: the gradient
    takes the place of the logits (no second [tokens, P] tensor; a second backward raises) instead of a new
    one: in backward, or at once where `ops` has `whole`. ops: who does the work on rows.

    In the latter case 16-bit gradients are rounded for an upstream gradient of 1, and again where it is
    another number; Megatron's schedules give 1.

    Mask and padding columns get gradient 0. A token with dalpha = 0 has loss 0 and gradient 0 exactly,
    whatever its logits hold (NaN, inf), and x0 may be any id there; so does the gradient of a row whose
    upstream gradient is 0. Raises ValueError on a layout that would need a copy, and on shards that do not
    cover the vocabulary.
    """
    check_shards(logits_BSP.shape[-1], noise, group)
    transposed = is_transposed(logits_BSP)
    tokens = to_tokens(zt_BS, x0_BS, alpha_B, beta_B, dalpha_B, compute_dtype(logits_BSP), transposed)
    shard = shard_of(logits_BSP.shape[-1], noise, group)
    loss_N = _VocabParallelNelbo.apply(logits_BSP, tokens, shard, group, transposed, grad_in_place, ops)
    return from_rows(loss_N, zt_BS.shape, transposed)


class _VocabParallelNelbo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_BSP: Tensor,
        tokens: Tokens,
        shard: Shard,
        group: dist.ProcessGroup | None,
        transposed: bool,
        grad_in_place: bool,
        ops: RowOps,
    ) -> Tensor:
        logits_NP = to_rows(logits_BSP, transposed)
        ctx.done = grad_in_place and ops.whole is not None and group is None and ctx.needs_input_grad[0]
        loss_N, terms_6N = shard_nelbo(
            logits_NP, tokens, shard, group, ops, out_NP=logits_NP if ctx.done else None
        )
        if ctx.done:
            torch.autograd.graph.increment_version(logits_BSP)
        ctx.save_for_backward(logits_BSP, terms_6N)
        ctx.tokens, ctx.shard, ctx.ops = tokens, shard, ops
        ctx.transposed, ctx.grad_in_place = transposed, grad_in_place
        return loss_N

    @staticmethod
    @opaque_to_compile
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        logits_BSP, terms_6N = ctx.saved_tensors
        grad_BSP = logits_BSP.detach() if ctx.grad_in_place else torch.empty_like(logits_BSP)
        logits_NP, grad_NP = to_rows(logits_BSP, ctx.transposed), to_rows(grad_BSP, ctx.transposed)
        if ctx.done:
            ctx.ops.rescale(grad_NP, ctx.tokens, upstream_N, ctx.shard)
        else:
            ctx.ops.grad(logits_NP, ctx.tokens, terms_6N, upstream_N, ctx.shard, grad_NP)
        if ctx.grad_in_place:
            # saved_tensors checks the version: a second backward raises
            torch.autograd.graph.increment_version(logits_BSP)
        return grad_BSP, *(None,) * 6


def shard_nelbo(
    logits_NP: Tensor,
    tokens: Tokens,
    shard: Shard,
    group: dist.ProcessGroup | None,
    ops: RowOps,
    out_NP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss [N], the same on every rank, and the terms_6N of ops.grad; all the communication is in here.

    out_NP, which may be logits_NP, gets the gradient for an upstream gradient of 1.
    """
    if ops.whole is not None and group is None:
        done = ops.whole(logits_NP, tokens, shard, out_NP)
        if done is not None:
            return done
    loss_N, terms_6N = _split_nelbo(logits_NP, tokens, shard, group, ops)
    if out_NP is not None:
        ops.grad(logits_NP, tokens, terms_6N, None, shard, out_NP)
    return loss_N, terms_6N


def _split_nelbo(
    logits_NP: Tensor, tokens: Tokens, shard: Shard, group: dist.ProcessGroup | None, ops: RowOps
) -> tuple[Tensor, Tensor]:
    """In passes, with the ranks' messages between them."""
    noise = shard.noise
    merged_5N = ops.merge(gather_ranks(ops.stats(logits_NP, tokens, shard), group), tokens, noise)
    if noise.uniform_ratio == 0:
        return ops.finish(merged_5N, None, tokens, noise)
    sums_R2N = gather_ranks(ops.sums(logits_NP, tokens, merged_5N, shard), group)
    return ops.finish(merged_5N, sums_R2N, tokens, noise)


def check_shards(P: int, noise: StationaryNoise, group: dist.ProcessGroup | None) -> None:
    """Raises ValueError unless every rank's P columns together cover the vocabulary."""
    ranks = 1 if group is None else group.size()
    if P * ranks < noise.vocab_size:
        raise ValueError(
            f"logits with {P} columns on {ranks} ranks do not cover "
            f"vocab_size={noise.vocab_size}; pass every rank's shard and the tensor-parallel group"
        )


def shard_of(P: int, noise: StationaryNoise, group: dist.ProcessGroup | None) -> Shard:
    """The ids that this rank's P columns stand for."""
    return Shard(noise, 0 if group is None else dist.get_rank(group) * P)


def gather_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Stack every rank's tensor in rank order, [R, ...]."""
    if group is None or group.size() == 1:
        return local[None]
    gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(group.size(), *local.shape)


def is_transposed(logits_BSP: Tensor) -> bool:
    """Whether the logits are stored as [S, B, P], as Megatron makes them."""
    if logits_BSP.is_contiguous():
        return False
    if logits_BSP.transpose(0, 1).is_contiguous():
        return True
    raise ValueError(
        f"logits (or hidden states) of shape {tuple(logits_BSP.shape)} with strides {logits_BSP.stride()} "
        "must be contiguous as [B, S, P] or as [S, B, P]; call .contiguous() on them, at the price of a copy"
    )


def to_rows(x_BSP: Tensor, transposed: bool) -> Tensor:
    """[B, S, P] as [N, P] in storage order: always a view."""
    x_BSP = x_BSP.detach()
    return (x_BSP.transpose(0, 1) if transposed else x_BSP).view(-1, x_BSP.shape[-1])


def to_tokens(
    zt_BS: Tensor,
    x0_BS: Tensor,
    alpha_B: Tensor,
    beta_B: Tensor,
    dalpha_B: Tensor,
    dtype: torch.dtype,
    transposed: bool,
) -> Tokens:
    """The tokens in the logits' storage order, contiguous; rates in `dtype`, one for every token."""
    rates = (per_token(x, dtype).expand(zt_BS.shape) for x in (alpha_B, beta_B, dalpha_B))
    order = (x.transpose(0, 1) if transposed else x for x in (zt_BS, x0_BS, *rates))
    return Tokens(*(x.reshape(-1).contiguous() for x in order))


def from_rows(x_N: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """[N] in storage order back to [B, S]."""
    return x_N.view(shape[1], shape[0]).transpose(0, 1) if transposed else x_N.view(shape)
