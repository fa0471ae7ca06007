"""Output head and loss in one: hidden states and the head's weight to the NELBO, some tokens at a time.

A chunk of C tokens is multiplied with the weight, its loss and the gradient of its logits are taken as in
vocab_parallel.py, and the gradient goes straight on into those of the hidden states and of the weight. The
logits of all tokens never exist; [C, P] is the largest buffer.

That is done in forward, for an upstream gradient of 1: three matrix products, as many as without fusion. The
backward pass scales the two gradients where every token's upstream gradient is the same number (a sum of
losses, scaled or not). Where it is not, or where backward is called again, it repeats the product with the
weight and multiplies each token's own upstream gradient in before the sum over tokens: four products.

At k = 0 only masked tokens have a loss, so only they are multiplied, in every product.

Shape suffixes: B batch, S sequence, H hidden, P vocabulary shard, N tokens in the hidden states' storage
order, C tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from xdlm_megatron.diffusion.nelbo import per_token
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import (
    GradTerms,
    check_shards,
    compute_dtype,
    from_tokens,
    is_transposed,
    row_grad,
    shard_nelbo,
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
) -> Tensor:
    """vocab_parallel_nelbo(hidden_BSH @ weight_PH.T, ...) without the logits: [B, S] nats, >= 0, equal on
    every rank.

    hidden_BSH: the whole sequence, the same on every rank, contiguous or the transpose of a contiguous
    [S, B, H]. weight_PH: this rank's rows of the head, of hidden's dtype. group: the tensor-parallel group.
    chunk_tokens: tokens whose logits exist at once; None: as CHUNK_ELEMENTS allows. The rest as there.

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
    loss: Tensor = _HeadNelbo.apply(
        hidden_BSH, weight_PH, zt_BS, x0_BS, alpha_B, beta_B, dalpha_B, noise, group, chunk_tokens, with_grad
    )
    return loss


@dataclass(frozen=True)
class _Head:
    """The tokens of a batch and the shard of the head that they meet."""

    hidden_NH: Tensor
    weight_PH: Tensor
    zt_N: Tensor
    x0_N: Tensor
    noise: StationaryNoise
    first_id: int
    chunk_tokens: int

    def chunks(self) -> list[Any]:
        """Indices of the tokens that have a loss: slices, or at k = 0 (after a device sync) ids of tokens."""
        N, C = len(self.zt_N), self.chunk_tokens
        if self.noise.uniform_ratio > 0:
            return [slice(start, min(start + C, N)) for start in range(0, N, C)]
        masked_M = self.noise.is_mask(self.zt_N).nonzero()[:, 0]
        return [tokens_C for tokens_C in masked_M.split(C) if len(tokens_C)]

    def buffer(self) -> Tensor:
        """Room for the logits of a chunk."""
        return self.hidden_NH.new_empty(min(self.chunk_tokens, len(self.zt_N)), len(self.weight_PH))

    def logits(self, rows: Any, buffer_CP: Tensor) -> Tensor:
        """[C, P], in the buffer."""
        hidden_CH = self.hidden_NH[rows]
        return torch.mm(hidden_CH, self.weight_PH.t(), out=buffer_CP[: len(hidden_CH)])


class _Gradients:
    """Of hidden states and weight, filled chunk by chunk. dtype is the loss's; needs: (hidden, weight)."""

    def __init__(self, head: _Head, dtype: torch.dtype, needs: tuple[bool, bool]) -> None:
        self.head = head
        self.hidden_NH = torch.zeros_like(head.hidden_NH) if needs[0] else None
        self.weight_PH = torch.zeros_like(head.weight_PH, dtype=dtype) if needs[1] else None

    def add(self, rows: Any, logits_CP: Tensor, terms: GradTerms, dead_C: Tensor) -> None:
        """One chunk. Its logits are overwritten with their gradient."""
        head = self.head
        place = (head.zt_N[rows], head.x0_N[rows], terms, dead_C, head.first_id, head.noise)
        row_grad(logits_CP, *place, out_NP=logits_CP)
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = logits_CP @ head.weight_PH
        if self.weight_PH is None:
            return
        if self.weight_PH.dtype == logits_CP.dtype:
            self.weight_PH.addmm_(logits_CP.t(), head.hidden_NH[rows])
        else:
            self.weight_PH += logits_CP.t() @ head.hidden_NH[rows]

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(hidden, weight) times a number, in the tensors' own dtypes; this object's are used up."""
        if self.hidden_NH is not None:
            self.hidden_NH.mul_(factor)
        weight_PH = None if self.weight_PH is None else self.weight_PH.mul_(factor)
        return self.hidden_NH, None if weight_PH is None else weight_PH.to(self.head.weight_PH.dtype)


class _HeadNelbo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BSH: Tensor,
        weight_PH: Tensor,
        zt_BS: Tensor,
        x0_BS: Tensor,
        alpha_B: Tensor,
        beta_B: Tensor,
        dalpha_B: Tensor,
        noise: StationaryNoise,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
        with_grad: bool,
    ) -> Tensor:
        transposed, dtype = is_transposed(hidden_BSH), compute_dtype(hidden_BSH)
        zt_N, x0_N = to_tokens(zt_BS, transposed), to_tokens(x0_BS, transposed)
        rates = (per_token(x, dtype).expand(zt_BS.shape) for x in (alpha_B, beta_B, dalpha_B))
        alpha_N, beta_N, dalpha_N = (to_tokens(x, transposed) for x in rates)
        first_id = 0 if group is None else dist.get_rank(group) * len(weight_PH)
        hidden_NH = to_rows(hidden_BSH, transposed)
        head = _Head(hidden_NH, weight_PH.detach(), zt_N, x0_N, noise, first_id, chunk_tokens)

        loss_N = torch.zeros(len(zt_N), dtype=dtype, device=zt_N.device)
        terms_6N = torch.zeros(6, len(zt_N), dtype=dtype, device=zt_N.device)
        gradients = _Gradients(head, dtype, ctx.needs_input_grad[:2]) if with_grad else None
        buffer_CP = head.buffer()
        for rows in head.chunks():
            logits_CP = head.logits(rows, buffer_CP)
            tokens_C = (zt_N[rows], x0_N[rows])
            rates_C = (alpha_N[rows], beta_N[rows], dalpha_N[rows])
            loss_N[rows], terms = shard_nelbo(logits_CP, *tokens_C, *rates_C, noise, first_id, group)
            if gradients is not None:
                terms_6N[:, rows] = torch.stack(terms)
                gradients.add(rows, logits_CP, terms, torch.zeros_like(zt_N[rows], dtype=torch.bool))
        ctx.save_for_backward(hidden_BSH, weight_PH, zt_N, x0_N, terms_6N)
        ctx.noise, ctx.first_id, ctx.chunk_tokens = noise, first_id, chunk_tokens
        ctx.transposed, ctx.gradients = transposed, gradients
        return from_tokens(loss_N, zt_BS.shape, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BSH, weight_PH, zt_N, x0_N, terms_6N = ctx.saved_tensors
        upstream_N = to_tokens(grad_BS, ctx.transposed)
        gradients, ctx.gradients = ctx.gradients, None
        factor = upstream_N[0]
        if gradients is None or not bool(((upstream_N == factor) & (factor != 0)).all()):
            hidden_NH = to_rows(hidden_BSH, ctx.transposed)
            head = _Head(hidden_NH, weight_PH.detach(), zt_N, x0_N, ctx.noise, ctx.first_id, ctx.chunk_tokens)
            gradients = _recompute(head, terms_6N, upstream_N, ctx.needs_input_grad[:2])
            factor = torch.ones_like(factor)
        grad_NH, grad_PH = gradients.scaled(factor)
        if grad_NH is None:
            return None, grad_PH, *(None,) * 9
        B, S, H = hidden_BSH.shape
        grad_BSH = grad_NH.view(S, B, H).transpose(0, 1) if ctx.transposed else grad_NH.view(B, S, H)
        return grad_BSH, grad_PH, *(None,) * 9


def _recompute(head: _Head, terms_6N: Tensor, upstream_N: Tensor, needs: tuple[bool, bool]) -> _Gradients:
    """The gradients for an upstream gradient that differs between tokens, from the logits made again."""
    gradients = _Gradients(head, terms_6N.dtype, needs)
    buffer_CP = head.buffer()
    for rows in head.chunks():
        top_C, scale_C, *coefficients = terms_6N[:, rows]
        upstream_C = upstream_N[rows]
        terms = GradTerms(top_C, scale_C, *(upstream_C * x_C for x_C in coefficients))
        gradients.add(rows, head.logits(rows, buffer_CP), terms, upstream_C == 0)
    return gradients
