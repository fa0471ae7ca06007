"""The finite-step KL of nelbo.py over a vocabulary split among ranks; for held-out bounds, without gradient.

The row operations are the loss's own (row_ops.py); only the closed form at the end differs, and it runs in
float64, because the step may be small and the last one has alpha_s = 1.

Shape suffixes: B batch, S sequence, P vocabulary shard, N tokens in the logits' storage order, R ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.nelbo import step_kl_from_scalars
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, Merged, RowOps, compute_dtype
from xdlm_megatron.diffusion.vocab_parallel import (
    check_shards,
    from_rows,
    gather_ranks,
    is_transposed,
    shard_of,
    to_rows,
    to_tokens,
)


@torch.no_grad()
def vocab_parallel_step_kl(
    logits_BSP: Tensor,
    zt_BS: Tensor,
    x0_BS: Tensor,
    alpha_s_BS: Tensor,
    alpha_t_BS: Tensor,
    noise: StationaryNoise,
    group: dist.ProcessGroup | None = None,
    ops: RowOps = REFERENCE,
) -> Tensor:
    """KL(q(z_s | z_t, x0) || p_theta(z_s | z_t)) per token, float64 [B, S] nats, equal on every rank.

    logits_BSP, group, ops: as vocab_parallel_nelbo's. alpha_s_BS > alpha_t_BS: float64, [B, S]; alpha_s = 1
    is the reconstruction term -log p_theta(x0 | z_t). Raises ValueError as vocab_parallel_nelbo does.
    """
    check_shards(logits_BSP.shape[-1], noise, group)
    transposed = is_transposed(logits_BSP)
    logits_NP, shard = to_rows(logits_BSP, transposed), shard_of(logits_BSP.shape[-1], noise, group)
    # The rows' sum T is taken at the floor of s; where that is 0, at any other one, and does not count.
    last_BS = alpha_s_BS == 1
    alpha_BS, beta_BS = (torch.where(last_BS, 0.5, x) for x in (alpha_s_BS, 1 - alpha_s_BS))
    dtype, live_BS = compute_dtype(logits_BSP), -torch.ones_like(alpha_s_BS)
    tokens = to_tokens(zt_BS, x0_BS, alpha_BS, beta_BS, live_BS, dtype, transposed)
    merged_5N = ops.merge(gather_ranks(ops.stats(logits_NP, tokens, shard), group), tokens, noise)
    merged = Merged(*merged_5N.double())
    T_N = torch.zeros_like(merged.rest)
    if noise.uniform_ratio > 0:
        T_N = gather_ranks(ops.sums(logits_NP, tokens, merged_5N, shard), group)[:, 0].double().sum(0)
    scalars = (merged.log_px, merged.rest, merged.p_z, T_N)
    log_px_BS, rest_BS, p_z_BS, T_BS = (from_rows(x_N, zt_BS.shape, transposed) for x_N in scalars)
    alphas = (alpha_s_BS.double(), alpha_t_BS.double())
    return step_kl_from_scalars(log_px_BS, rest_BS, p_z_BS, T_BS, zt_BS, x0_BS, *alphas, noise)
