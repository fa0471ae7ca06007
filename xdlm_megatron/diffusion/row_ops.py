"""The five row operations behind vocab_parallel.py and head_nelbo.py, readable in PyTorch.

Each pass over the vocabulary (stats, sums, grad) takes one shard's logits, a few rows at a time; merge and
finish take numbers per token. With q_e = p_e / c (k = 0: q_e = p_e), a_e = q_e / (1 + q_e) and
rho = -alpha'/beta, times c / (1 + c) where z_t = x0,

    T = sum over e != x of log1p(q_e)                      s = sum over e != x of q_e a_e
    dL/dl_x = X                                            dL/dl_e = q_e (G + R a_e) + [e = z] Z, e != x
    h = a_x (1 - p_x + [z = x] v / alpha)                  Z = [z noise] rho a_z^2 / alpha
    R = rho c    G = R (h - c s) - c Z                     (k = 0: R = Z = 0, G = rho [z = mask])
    X = -rho (h (1 - p_x) + p_x c s) - p_x Z               (k = 0: X = -G (1 - p_x))

Near p_x = 1 the gradient vanishes like 1 - p_x or faster, and keeps its digits: x0 stays out of every sum,
1 - p_x is the sum of the others, and X, minus the sum of the others' gradients, has parts of one sign.

A token is *live* where it has a loss: dalpha != 0, and z_t is the mask if k = 0. What is not live has loss 0
and gradient 0 exactly, whatever its logits (NaN, inf), ids and rates are.

`RowOps` is the seam for other implementations (xdlm_megatron/kernels); REFERENCE is this one.

Shape suffixes: P vocabulary shard, N tokens, R ranks; a digit is a number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdlm_megatron.diffusion.nelbo import density_from_scalars
from xdlm_megatron.diffusion.noise import StationaryNoise

# Elements of one scratch buffer: it should stay in a core's cache on a CPU and fill a GPU.
SCRATCH_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True)
class Tokens:
    """What the loss knows of N tokens besides their logits: ids int64 [N], rates in the loss's dtype [N]."""

    zt_N: Tensor
    x0_N: Tensor
    alpha_N: Tensor
    beta_N: Tensor
    dalpha_N: Tensor

    def __len__(self) -> int:
        return len(self.zt_N)

    def __getitem__(self, rows: Any) -> Tokens:
        return Tokens(*(x[rows] for x in (self.zt_N, self.x0_N, self.alpha_N, self.beta_N, self.dalpha_N)))

    def live(self, noise: StationaryNoise) -> Tensor:
        """bool [N]: who has a loss."""
        live_N = self.dalpha_N != 0
        return live_N & noise.is_mask(self.zt_N) if noise.uniform_ratio == 0 else live_N


class Shard(NamedTuple):
    """Columns of the vocabulary that a rank holds: the ids from first_id on, mask and padding among them."""

    noise: StationaryNoise
    first_id: int = 0


class Merged(NamedTuple):
    """A token's softmax over all ranks, each [N]: q = scale exp(l - top); 1 - p_x; log p_x; p_z."""

    top: Tensor
    scale: Tensor
    rest: Tensor
    log_px: Tensor
    p_z: Tensor


class GradTerms(NamedTuple):
    """What grad needs of a token, each [N]: q = scale exp(l - top), and R, G, X, Z of this module's head."""

    top: Tensor
    scale: Tensor
    R: Tensor
    G: Tensor
    X: Tensor
    Z: Tensor


class RowOps(NamedTuple):
    """One implementation of the row operations. All numbers per token are in the loss's dtype.

    stats(logits_NP, tokens, shard) -> stats_4N; merge(stats_R4N, tokens, noise) -> merged_5N, the rows of
    Merged; sums(logits_NP, tokens, merged_5N, shard) -> sums_2N, not called at k = 0;
    finish(merged_5N, sums_R2N or None, tokens, noise) -> loss_N, terms_6N, the rows of GradTerms;
    grad(logits_NP, tokens, terms_6N, upstream_N or None, shard, out_NP) -> None.

    Optional, for one rank with the whole vocabulary, where a single read of the logits can do it:
    whole(logits_NP, tokens, shard, out_NP or None) -> (loss_N, terms_6N), or None for rows that it cannot
    take; out_NP, which may be logits_NP, gets the gradient for an upstream gradient of 1. With it comes
    rescale(grad_NP, tokens, upstream_N, shard) -> None: such a gradient times upstream_N, in place; rows of
    factor 0 become 0 whatever they hold.
    """

    stats: Callable[[Tensor, Tokens, Shard], Tensor]
    merge: Callable[[Tensor, Tokens, StationaryNoise], Tensor]
    sums: Callable[[Tensor, Tokens, Tensor, Shard], Tensor]
    finish: Callable[[Tensor, Tensor | None, Tokens, StationaryNoise], tuple[Tensor, Tensor]]
    grad: Callable[[Tensor, Tokens, Tensor, Tensor | None, Shard, Tensor], None]
    whole: Callable[[Tensor, Tokens, Shard, Tensor | None], tuple[Tensor, Tensor] | None] | None = None
    rescale: Callable[[Tensor, Tokens, Tensor, Shard], None] | None = None


def row_stats(logits_NP: Tensor, tokens: Tokens, shard: Shard) -> Tensor:
    """[4, N]: a bound on this shard's other logits, sum of exp(l - bound) over e != x0, logits of x0 and z_t.

    The bound is the largest logit. The logits of x0 and z_t are -inf where another shard owns the id, or
    where it is the mask.
    """
    stats_4N = torch.empty(4, logits_NP.shape[0], dtype=compute_dtype(logits_NP), device=logits_NP.device)
    for row, ids_N in ((3, tokens.zt_N), (2, tokens.x0_N)):
        index_N1, owned_N = _local(ids_N, shard.first_id, logits_NP.shape[1])
        picked_N = logits_NP.gather(1, index_N1)[:, 0].to(stats_4N.dtype)
        stats_4N[row] = torch.where(owned_N & ~shard.noise.is_mask(ids_N), picked_N, -torch.inf)
    kept_N1 = torch.where(owned_N, 0.0, 1.0).to(stats_4N.dtype)[:, None]
    for rows, x, _ in _chunks(logits_NP, shard):
        top = x.amax(-1)
        # a shard of nothing but padding has max -inf and sum 0
        x.sub_(top.masked_fill(top == -torch.inf, 0.0)[:, None]).exp_()
        _scale_column(x, index_N1[rows], kept_N1[rows])
        stats_4N[0, rows], stats_4N[1, rows] = top, x.sum(-1)
    return stats_4N


def merge_stats(stats_R4N: Tensor, tokens: Tokens, noise: StationaryNoise) -> Tensor:
    """[5, N], the rows of Merged, from all ranks' stats in rank order."""
    top_RN, others_RN, l_x_RN, l_z_RN = stats_R4N.unbind(1)
    top_N = torch.maximum(top_RN.amax(0), l_x_RN.amax(0))
    others_N = (others_RN * (top_RN - top_N).exp()).sum(0)
    l_x_N, l_z_N = l_x_RN.amax(0) - top_N, l_z_RN.amax(0) - top_N
    total_N = others_N + l_x_N.exp()
    rest_N, log_total_N = others_N / total_N, total_N.log()
    log_px_N = torch.where(rest_N < 0.5, torch.log1p(-rest_N), l_x_N - log_total_N)
    c_N = 1.0 if noise.uniform_ratio == 0 else noise.floor(tokens.alpha_N, tokens.beta_N)
    return torch.stack([top_N, 1 / (total_N * c_N), rest_N, log_px_N, (l_z_N - log_total_N).exp()])


def row_sums(logits_NP: Tensor, tokens: Tokens, merged_5N: Tensor, shard: Shard) -> Tensor:
    """[2, N]: this shard's T and s."""
    merged = Merged(*merged_5N)
    sums_2N = torch.empty(2, logits_NP.shape[0], dtype=merged_5N.dtype, device=logits_NP.device)
    index_N1, owned_N = _local(tokens.x0_N, shard.first_id, logits_NP.shape[1])
    kept_N1 = torch.where(owned_N, 0.0, 1.0).to(merged_5N.dtype)[:, None]
    for rows, q, ratio in _chunks(logits_NP, shard):
        q.sub_(merged.top[rows, None]).exp_().mul_(merged.scale[rows, None])
        _scale_column(q, index_N1[rows], kept_N1[rows])
        _ratio(q, out=ratio)
        sums_2N[1, rows] = ratio.mul_(q).sum(-1)
        sums_2N[0, rows] = q.log1p_().sum(-1)
    return sums_2N


def finish_rows(
    merged_5N: Tensor, sums_R2N: Tensor | None, tokens: Tokens, noise: StationaryNoise
) -> tuple[Tensor, Tensor]:
    """(loss [N], the rows of GradTerms [6, N]) from all ranks' sums in rank order; None at k = 0."""
    merged, live_N = Merged(*merged_5N), tokens.live(noise)
    if sums_R2N is None:
        loss_N, terms = _mask_noise_terms(merged, tokens)
    else:
        T_N, s_N = sums_R2N.sum(0)
        p_x_N = merged.log_px.exp()
        rates_N = (tokens.alpha_N, tokens.beta_N, tokens.dalpha_N)
        loss_N = density_from_scalars(
            p_x_N, merged.rest, merged.p_z, T_N, tokens.zt_N, tokens.x0_N, *rates_N, noise
        )
        terms = _grad_terms(merged, p_x_N, s_N, tokens, noise)
    terms_6N = torch.stack(terms)
    terms_6N[2:].masked_fill_(~live_N, 0.0)
    return loss_N.masked_fill(~live_N, 0.0), terms_6N


def _grad_terms(
    merged: Merged, p_x_N: Tensor, s_N: Tensor, tokens: Tokens, noise: StationaryNoise
) -> GradTerms:
    """The gradient's coefficients for k > 0. Ratios are formed before products: c^2 may underflow."""
    alpha_N, c_N = tokens.alpha_N, noise.floor(tokens.alpha_N, tokens.beta_N)
    same_N = tokens.zt_N == tokens.x0_N
    a_x_N, a_z_N = p_x_N / (p_x_N + c_N), merged.p_z / (merged.p_z + c_N)
    v_N = merged.rest / (p_x_N + c_N)
    rho_N = -tokens.dalpha_N / tokens.beta_N * torch.where(same_N, c_N / (1 + c_N), 1.0)
    h_N = a_x_N * (merged.rest + torch.where(same_N, v_N / alpha_N, 0.0))
    Z_N = torch.where(same_N | noise.is_mask(tokens.zt_N), 0.0, rho_N * a_z_N.square() / alpha_N)
    R_N, mean_a_N = rho_N * c_N, c_N * s_N
    X_N = -rho_N * (h_N * merged.rest + p_x_N * mean_a_N) - p_x_N * Z_N
    return GradTerms(merged.top, merged.scale, R_N, R_N * (h_N - mean_a_N) - c_N * Z_N, X_N, Z_N)


def _mask_noise_terms(merged: Merged, tokens: Tokens) -> tuple[Tensor, GradTerms]:
    """Loss and gradient coefficients of masked tokens at k = 0: weighted cross-entropy."""
    weight_N = -tokens.dalpha_N / tokens.beta_N
    nothing_N = torch.zeros_like(weight_N)
    terms = GradTerms(merged.top, merged.scale, nothing_N, weight_N, -weight_N * merged.rest, nothing_N)
    return -weight_N * merged.log_px, terms


def row_grad(
    logits_NP: Tensor,
    tokens: Tokens,
    terms_6N: Tensor,
    upstream_N: Tensor | None,
    shard: Shard,
    out_NP: Tensor,
) -> None:
    """Write upstream dL/dl into out_NP, which may be logits_NP itself; upstream None is 1.

    It multiplies in the terms' dtype, before the only rounding to that of the logits. Rows whose R, G, X and
    Z are 0, or whose upstream gradient is 0, get 0 whatever they hold.
    """
    dead_N = (terms_6N[2:] == 0).all(0)
    if upstream_N is not None:
        dead_N |= upstream_N == 0
        terms_6N = torch.cat([terms_6N[:2], terms_6N[2:] * upstream_N])
    terms = GradTerms(*terms_6N)
    index_x_N1, owns_x_N = _local(tokens.x0_N, shard.first_id, logits_NP.shape[1])
    index_z_N1, owns_z_N = _local(tokens.zt_N, shard.first_id, logits_NP.shape[1])
    Z_N1 = torch.where(owns_z_N, terms.Z, 0.0)[:, None]
    for rows, q, slope in _chunks(logits_NP, shard):
        q.sub_(terms.top[rows, None]).exp_()
        if shard.noise.uniform_ratio == 0:
            q.mul_((terms.scale * terms.G)[rows, None])
        else:
            q.mul_(terms.scale[rows, None])
            _ratio(q, out=slope)
            q.mul_(torch.addcmul(terms.G[rows, None], terms.R[rows, None], slope, out=slope))
            q.scatter_add_(1, index_z_N1[rows], Z_N1[rows])
        x0_N1 = torch.where(owns_x_N[rows, None], terms.X[rows, None], q.gather(1, index_x_N1[rows]))
        q.scatter_(1, index_x_N1[rows], x0_N1)
        out_NP[rows] = q.masked_fill_(dead_N[rows, None], 0.0)


REFERENCE = RowOps(row_stats, merge_stats, row_sums, finish_rows, row_grad)


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The loss's dtype: float32, or float64 for float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits_NP: Tensor, shard: Shard) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, logits of these rows in the compute dtype with -inf at mask and padding, a second
    scratch).
    """
    N, P = logits_NP.shape
    size = max(1, SCRATCH_ELEMENTS.get(logits_NP.device.type, 1 << 24) // P)
    scratch = torch.empty(2, min(size, N), P, dtype=compute_dtype(logits_NP), device=logits_NP.device)
    for start in range(0, N, size):
        rows = slice(start, min(start + size, N))
        x, other = scratch[:, : rows.stop - start].unbind(0)
        x.copy_(logits_NP[rows])
        hide_noise(x, shard)
        yield rows, x, other


def hide_noise(logits_NP: Tensor, shard: Shard) -> None:
    """-inf at the mask and from the padding on, in place."""
    P, (noise, first_id) = logits_NP.shape[1], shard
    mask_column = -1 if noise.mask_id is None else noise.mask_id - first_id
    if 0 <= mask_column < P:
        logits_NP[:, mask_column] = -torch.inf
    logits_NP[:, min(max(noise.vocab_size - first_id, 0), P) :] = -torch.inf


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
