"""The loss of nelbo.py over a vocabulary split among ranks, with its analytic gradient and no float32 copy.

Rank r of the group owns the ids [r P, (r + 1) P), Megatron's rule. The logits are read three times, a few
rows at a time: row_stats (max, sum of the others' exponentials, two gathered logits), row_sums (k > 0 only:
T and s) and, in backward, row_grad. With q_e = p_e / c (k = 0: q_e = p_e), a_e = q_e / (1 + q_e) and
rho = -alpha'/beta, times c / (1 + c) where z_t = x0,

    T = sum over e != x of log1p(q_e)                      s = sum over e != x of q_e a_e
    dL/dl_e = q_e (G + R a_e) + [e = x] X + [e = z] Z
    X = -rho a_x (1 + [z = x] v / alpha)                   Z = [z noise] rho a_z^2 / alpha
    R = rho c    G = -R (c s + p_x a_x) - c (X + Z)        (k = 0: R = 0, G = -X = rho [z = mask])

The upstream gradient multiplies R, G, X, Z in float32, before the gradient's only rounding to the logits'
dtype. Communication: one all-gather of 16 bytes a token, one of 8 (k > 0 only), none in backward. Both are
merged in rank order, so that every rank gets the same bits; an all-reduce does not promise that.

Shape suffixes: B batch, S sequence, P vocabulary shard, N tokens in the logits' storage order, R ranks.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from xdlm_megatron.diffusion.nelbo import density_from_scalars, per_token
from xdlm_megatron.diffusion.noise import StationaryNoise

# Elements of one scratch buffer: it should stay in a core's cache on a CPU and fill a GPU.
SCRATCH_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


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
) -> Tensor:
    """NELBO per token and unit of t: [B, S] nats, >= 0, float32 (float64 for float64 logits), equal on
    every rank.

    logits_BSP: this rank's columns, any float dtype, contiguous or the transpose of a contiguous [S, B, P].
    zt_BS, x0_BS: int64 global ids; x0 is never the mask. alpha_B, beta_B, dalpha_B: float [B] or
    broadcastable to [B, S]. group: the tensor-parallel group; None is one rank. grad_in_place: backward
    writes the gradient over the logits (no second [tokens, P] tensor; a second backward raises) instead of
    allocating one.

    Mask and padding columns get gradient 0. A row whose upstream gradient is 0 gets gradient 0 even if it
    holds NaN. Raises ValueError on a layout that would need a copy, and on shards that do not cover the
    vocabulary.
    """
    check_shards(logits_BSP.shape[-1], noise, group)
    loss: Tensor = _VocabParallelNelbo.apply(
        logits_BSP, zt_BS, x0_BS, alpha_B, beta_B, dalpha_B, noise, group, grad_in_place
    )
    return loss


class GradTerms(NamedTuple):
    """What row_grad needs of a token, each [N]: q = scale exp(l - top), and R, G, X, Z as in this module's
    head.
    """

    top: Tensor
    scale: Tensor
    R: Tensor
    G: Tensor
    X: Tensor
    Z: Tensor


class _VocabParallelNelbo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_BSP: Tensor,
        zt_BS: Tensor,
        x0_BS: Tensor,
        alpha_B: Tensor,
        beta_B: Tensor,
        dalpha_B: Tensor,
        noise: StationaryNoise,
        group: dist.ProcessGroup | None,
        grad_in_place: bool,
    ) -> Tensor:
        transposed = is_transposed(logits_BSP)
        logits_NP = to_rows(logits_BSP, transposed)
        dtype = compute_dtype(logits_BSP)
        first_id = 0 if group is None else dist.get_rank(group) * logits_NP.shape[1]
        zt_N, x0_N = to_tokens(zt_BS, transposed), to_tokens(x0_BS, transposed)
        rates = (per_token(x, dtype).expand(zt_BS.shape) for x in (alpha_B, beta_B, dalpha_B))
        alpha_N, beta_N, dalpha_N = (to_tokens(x, transposed) for x in rates)
        loss_N, terms = shard_nelbo(logits_NP, zt_N, x0_N, alpha_N, beta_N, dalpha_N, noise, first_id, group)
        ctx.save_for_backward(logits_BSP, zt_N, x0_N, *terms)
        ctx.noise, ctx.first_id, ctx.transposed, ctx.grad_in_place = (
            noise,
            first_id,
            transposed,
            grad_in_place,
        )
        return from_tokens(loss_N, zt_BS.shape, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BS: Tensor) -> tuple[Tensor | None, ...]:
        logits_BSP, zt_N, x0_N, top_N, scale_N, *coefficients = ctx.saved_tensors
        upstream_N = to_tokens(grad_BS, ctx.transposed)
        terms = GradTerms(top_N, scale_N, *(upstream_N * x_N for x_N in coefficients))
        # Writing through detach() bumps the version that saved_tensors checks: a second backward raises.
        grad_BSP = logits_BSP.detach() if ctx.grad_in_place else torch.empty_like(logits_BSP)
        logits_NP, grad_NP = to_rows(logits_BSP, ctx.transposed), to_rows(grad_BSP, ctx.transposed)
        row_grad(logits_NP, zt_N, x0_N, terms, upstream_N == 0, ctx.first_id, ctx.noise, out_NP=grad_NP)
        return grad_BSP, *(None,) * 8


def shard_nelbo(
    logits_NP: Tensor,
    zt_N: Tensor,
    x0_N: Tensor,
    alpha_N: Tensor,
    beta_N: Tensor,
    dalpha_N: Tensor,
    noise: StationaryNoise,
    first_id: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, GradTerms]:
    """Loss [N], the same on every rank, and what row_grad needs; all the communication is in here."""
    stats_R4N = _gather_ranks(row_stats(logits_NP, zt_N, x0_N, first_id, noise), group)
    top_N, total_N, rest_N, log_px_N, p_z_N = merge_stats(stats_R4N)
    if noise.uniform_ratio == 0:
        return mask_noise_terms(top_N, total_N, log_px_N, zt_N, beta_N, dalpha_N, noise)
    scale_N = 1 / (total_N * noise.floor(alpha_N, beta_N))
    sums_R2N = _gather_ranks(row_sums(logits_NP, x0_N, top_N, scale_N, first_id, noise), group)
    T_N, s_N = sums_R2N.sum(0)
    rates_N = (alpha_N, beta_N, dalpha_N)
    p_N = (log_px_N.exp(), rest_N, p_z_N)
    loss_N = density_from_scalars(*p_N, T_N, zt_N, x0_N, *rates_N, noise)
    return loss_N, grad_terms(top_N, scale_N, *p_N, s_N, zt_N, x0_N, *rates_N, noise)


def row_stats(logits_NP: Tensor, zt_N: Tensor, x0_N: Tensor, first_id: int, noise: StationaryNoise) -> Tensor:
    """[4, N]: this shard's max logit, sum of exp(l - max) over e != x0, logits of x0 and z_t.

    The logits are -inf where another shard owns the id, or where it is the mask. x0 stays out of the sum so
    that 1 - p_x keeps its digits where p_x is near 1.
    """
    stats_4N = torch.empty(4, logits_NP.shape[0], dtype=compute_dtype(logits_NP), device=logits_NP.device)
    for row, ids_N in ((3, zt_N), (2, x0_N)):
        index_N1, owned_N = _local(ids_N, first_id, logits_NP.shape[1])
        picked_N = logits_NP.gather(1, index_N1)[:, 0].to(stats_4N.dtype)
        stats_4N[row] = torch.where(owned_N & ~noise.is_mask(ids_N), picked_N, -torch.inf)
    kept_N1 = torch.where(owned_N, 0.0, 1.0).to(stats_4N.dtype)[:, None]
    for rows, x, _ in _chunks(logits_NP, first_id, noise):
        top = x.amax(-1)
        # a shard of nothing but padding has max -inf and sum 0
        x.sub_(top.masked_fill(top == -torch.inf, 0.0)[:, None]).exp_()
        _scale_column(x, index_N1[rows], kept_N1[rows])
        stats_4N[0, rows], stats_4N[1, rows] = top, x.sum(-1)
    return stats_4N


def merge_stats(stats_R4N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All ranks' row_stats -> (max, sum of exponentials, 1 - p_x, log p_x, p_z), each [N]."""
    top_RN, others_RN, l_x_RN, l_z_RN = stats_R4N.unbind(1)
    top_N = top_RN.amax(0)
    others_N = (others_RN * (top_RN - top_N).exp()).sum(0)
    l_x_N, l_z_N = l_x_RN.amax(0) - top_N, l_z_RN.amax(0) - top_N
    total_N = others_N + l_x_N.exp()
    rest_N, log_total_N = others_N / total_N, total_N.log()
    log_px_N = torch.where(rest_N < 0.5, torch.log1p(-rest_N), l_x_N - log_total_N)
    return top_N, total_N, rest_N, log_px_N, (l_z_N - log_total_N).exp()


def row_sums(
    logits_NP: Tensor, x0_N: Tensor, top_N: Tensor, scale_N: Tensor, first_id: int, noise: StationaryNoise
) -> Tensor:
    """[2, N]: this shard's T and s, with q = scale exp(l - top)."""
    sums_2N = torch.empty(2, logits_NP.shape[0], dtype=top_N.dtype, device=logits_NP.device)
    index_N1, owned_N = _local(x0_N, first_id, logits_NP.shape[1])
    kept_N1 = torch.where(owned_N, 0.0, 1.0).to(top_N.dtype)[:, None]
    for rows, q, ratio in _chunks(logits_NP, first_id, noise):
        q.sub_(top_N[rows, None]).exp_().mul_(scale_N[rows, None])
        _scale_column(q, index_N1[rows], kept_N1[rows])
        _ratio(q, out=ratio)
        sums_2N[1, rows] = ratio.mul_(q).sum(-1)
        sums_2N[0, rows] = q.log1p_().sum(-1)
    return sums_2N


def grad_terms(
    top_N: Tensor,
    scale_N: Tensor,
    p_x_N: Tensor,
    rest_N: Tensor,
    p_z_N: Tensor,
    s_N: Tensor,
    zt_N: Tensor,
    x0_N: Tensor,
    alpha_N: Tensor,
    beta_N: Tensor,
    dalpha_N: Tensor,
    noise: StationaryNoise,
) -> GradTerms:
    """The gradient's coefficients for k > 0. Ratios are formed before products: c^2 may underflow."""
    c_N, same_N = noise.floor(alpha_N, beta_N), zt_N == x0_N
    a_x_N, a_z_N = p_x_N / (p_x_N + c_N), p_z_N / (p_z_N + c_N)
    v_N = rest_N / (p_x_N + c_N)
    rho_N = -dalpha_N / beta_N * torch.where(same_N, c_N / (1 + c_N), 1.0)
    X_N = -rho_N * a_x_N * (1 + torch.where(same_N, v_N / alpha_N, 0.0))
    Z_N = torch.where(same_N | noise.is_mask(zt_N), 0.0, rho_N * a_z_N.square() / alpha_N)
    R_N, mean_a_N = rho_N * c_N, c_N * s_N + p_x_N * a_x_N
    return GradTerms(top_N, scale_N, R_N, -R_N * mean_a_N - c_N * (X_N + Z_N), X_N, Z_N)


def mask_noise_terms(
    top_N: Tensor,
    total_N: Tensor,
    log_px_N: Tensor,
    zt_N: Tensor,
    beta_N: Tensor,
    dalpha_N: Tensor,
    noise: StationaryNoise,
) -> tuple[Tensor, GradTerms]:
    """Loss and gradient coefficients at k = 0: weighted cross-entropy on masks, 0 on visible tokens."""
    weight_N = torch.where(noise.is_mask(zt_N), -dalpha_N / beta_N, 0.0)
    loss_N = torch.where(weight_N > 0, -weight_N * log_px_N, 0.0)
    nothing_N = torch.zeros_like(weight_N)
    return loss_N, GradTerms(top_N, 1 / total_N, nothing_N, weight_N, -weight_N, nothing_N)


def row_grad(
    logits_NP: Tensor,
    zt_N: Tensor,
    x0_N: Tensor,
    terms: GradTerms,
    dead_N: Tensor,
    first_id: int,
    noise: StationaryNoise,
    *,
    out_NP: Tensor,
) -> None:
    """Write dL/dl into out_NP (which may be logits_NP itself); rows marked in dead_N get 0 whatever they
    hold.
    """
    index_x_N1, owns_x_N = _local(x0_N, first_id, logits_NP.shape[1])
    index_z_N1, owns_z_N = _local(zt_N, first_id, logits_NP.shape[1])
    X_N1 = torch.where(owns_x_N, terms.X, 0.0)[:, None]
    Z_N1 = torch.where(owns_z_N, terms.Z, 0.0)[:, None]
    for rows, q, slope in _chunks(logits_NP, first_id, noise):
        q.sub_(terms.top[rows, None]).exp_()
        if noise.uniform_ratio == 0:
            q.mul_((terms.scale * terms.G)[rows, None])
        else:
            q.mul_(terms.scale[rows, None])
            _ratio(q, out=slope)
            q.mul_(torch.addcmul(terms.G[rows, None], terms.R[rows, None], slope, out=slope))
            q.scatter_add_(1, index_z_N1[rows], Z_N1[rows])
        q.scatter_add_(1, index_x_N1[rows], X_N1[rows])
        out_NP[rows] = q.masked_fill_(dead_N[rows, None], 0.0)


def _chunks(
    logits_NP: Tensor, first_id: int, noise: StationaryNoise
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, logits of these rows in the compute dtype with -inf at mask and padding, a second
    scratch).
    """
    N, P = logits_NP.shape
    size = max(1, SCRATCH_ELEMENTS.get(logits_NP.device.type, 1 << 24) // P)
    scratch = torch.empty(2, min(size, N), P, dtype=compute_dtype(logits_NP), device=logits_NP.device)
    mask_column = -1 if noise.mask_id is None else noise.mask_id - first_id
    padding = min(max(noise.vocab_size - first_id, 0), P)
    for start in range(0, N, size):
        rows = slice(start, min(start + size, N))
        x, other = scratch[:, : rows.stop - start].unbind(0)
        x.copy_(logits_NP[rows])
        if 0 <= mask_column < P:
            x[:, mask_column] = -torch.inf
        x[:, padding:] = -torch.inf
        yield rows, x, other


def _ratio(q_NP: Tensor, *, out: Tensor) -> Tensor:
    """q / (1 + q)."""
    torch.add(q_NP, 1, out=out)
    return torch.div(q_NP, out, out=out)


def _scale_column(x_NP: Tensor, index_N1: Tensor, factor_N1: Tensor) -> None:
    """Multiply one column of each row, in place."""
    x_NP.scatter_(1, index_N1, x_NP.gather(1, index_N1) * factor_N1)


def _local(ids_N: Tensor, first_id: int, P: int) -> tuple[Tensor, Tensor]:
    """(column of each id in this shard as [N, 1], 0 if it is elsewhere; whether the shard owns it)."""
    column_N = ids_N - first_id
    owned_N = (column_N >= 0) & (column_N < P)
    return torch.where(owned_N, column_N, 0)[:, None], owned_N


def check_shards(P: int, noise: StationaryNoise, group: dist.ProcessGroup | None) -> None:
    """Raises ValueError unless every rank's P columns together cover the vocabulary."""
    ranks = 1 if group is None else group.size()
    if P * ranks < noise.vocab_size:
        raise ValueError(
            f"logits with {P} columns on {ranks} ranks do not cover "
            f"vocab_size={noise.vocab_size}; pass every rank's shard and the tensor-parallel group"
        )


def _gather_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Stack every rank's tensor in rank order, [R, ...]."""
    if group is None or group.size() == 1:
        return local[None]
    gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(group.size(), *local.shape)


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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


def to_tokens(x_BS: Tensor, transposed: bool) -> Tensor:
    """[B, S] as [N] in the logits' storage order."""
    return (x_BS.transpose(0, 1) if transposed else x_BS).reshape(-1)


def from_tokens(x_N: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """[N] in storage order back to [B, S]."""
    return x_N.view(shape[1], shape[0]).transpose(0, 1) if transposed else x_N.view(shape)
