"""The loss of XDLM per token, dense and readable: the continuous-time NELBO and the finite-step KL.

With p the model's law of the clean token (mask and padding columns excluded) and c = beta k / (V alpha):

    v = (1 - p_x) / (p_x + c)       A = log1p(v)       T = sum over e != x of log1p(p_e / c)
    B = (1 + c) A - c T             ( = KL(q_t(.|x) || q_t(.|p)) / alpha, not negative )
    z = mask     g = B / beta
    z = x        g = (B + (v - log1p(v)) / alpha) c / (1 + c) / beta
    z = other    g = (B + (log1p(u) - u / (1 + u)) / alpha) / beta,      u = p_z / c

and NELBO density = -alpha'(t) g, in nats per unit of t. At k = 0, g = -log p_x / beta for z = mask and 0
otherwise (MDLM). It equals XDLM (arXiv 2602.01362) Eq. 15; docs/maths.md derives it.

Shape suffixes: B batch, S sequence, V vocabulary (columns beyond noise.vocab_size are padding).
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from xdlm_megatron.diffusion.noise import StationaryNoise


def nelbo_density(
    logits_BSV: Tensor,
    zt_BS: Tensor,
    x0_BS: Tensor,
    alpha_B: Tensor,
    beta_B: Tensor,
    dalpha_B: Tensor,
    noise: StationaryNoise,
) -> Tensor:
    """NELBO per token and unit of t: [B, S] nats, >= 0.

    logits_BSV: any float dtype (16-bit is computed in float32), not modified. zt_BS, x0_BS: int64; x0 is
    never the mask. alpha_B, beta_B, dalpha_B: float [B] or broadcastable to [B, S]; dalpha < 0, or 0 for a
    token without weight. Such a token has loss 0 and gradient 0 exactly, whatever its logits (NaN, inf),
    its x0, alpha and beta are. Differentiable in the logits.
    """
    dead_BS = (per_token(dalpha_B, dalpha_B.dtype) == 0).expand(zt_BS.shape)
    log_p_BSV = log_probabilities(logits_BSV.masked_fill(dead_BS[..., None], 0.0), noise)
    alpha, beta, dalpha = (per_token(x, log_p_BSV.dtype) for x in (alpha_B, beta_B, dalpha_B))
    alpha, beta = (x.expand(zt_BS.shape).masked_fill(dead_BS, 1.0) for x in (alpha, beta))
    x0_BS = x0_BS.masked_fill(dead_BS, 1 if noise.mask_id == 0 else 0)
    log_px_BS = gather(log_p_BSV, x0_BS)
    if noise.uniform_ratio == 0:
        return torch.where(noise.is_mask(zt_BS) & ~dead_BS, dalpha / beta * log_px_BS, 0.0)
    c = noise.floor(alpha, beta)
    p_BSV = log_p_BSV.exp()
    others_BSV = p_BSV.scatter(-1, x0_BS[..., None], 0.0)
    rest_BS, T_BS = others_BSV.sum(-1), torch.log1p(others_BSV / c[..., None]).sum(-1)
    p_x_BS, p_z_BS = log_px_BS.exp(), gather(p_BSV, zt_BS)
    loss_BS = density_from_scalars(p_x_BS, rest_BS, p_z_BS, T_BS, zt_BS, x0_BS, alpha, beta, dalpha, noise)
    return loss_BS.masked_fill(dead_BS, 0.0)


def finite_step_kl(
    logits_BSV: Tensor,
    zt_BS: Tensor,
    x0_BS: Tensor,
    alpha_s_B: Tensor,
    alpha_t_B: Tensor,
    noise: StationaryNoise,
) -> Tensor:
    """KL(q(z_s | z_t, x0) || p_theta(z_s | z_t)) per token, [B, S] nats, for alpha_s > alpha_t.

    alpha_s = 1 is the reconstruction term, -log p_theta(x0 | z_t). Same tensors as nelbo_density; best in
    float64: beta is taken as 1 - alpha. Positions z_t that x0 cannot reach (k = 0, neither x0 nor the mask)
    give 0.
    """
    log_p_BSV = log_probabilities(logits_BSV, noise)
    alpha_s, alpha_t = per_token(alpha_s_B, log_p_BSV.dtype), per_token(alpha_t_B, log_p_BSV.dtype)
    log_px_BS, p_BSV = gather(log_p_BSV, x0_BS), log_p_BSV.exp()
    c_s = noise.floor(alpha_s, 1 - alpha_s)
    T_BS = _others_log1p(p_BSV, x0_BS, torch.where(c_s > 0, c_s, 1.0))
    p_z_BS, rest_BS = gather(p_BSV, zt_BS), -torch.expm1(log_px_BS)
    return step_kl_from_scalars(log_px_BS, rest_BS, p_z_BS, T_BS, zt_BS, x0_BS, alpha_s, alpha_t, noise)


def step_kl_from_scalars(
    log_px_BS: Tensor,
    rest_BS: Tensor,
    p_z_BS: Tensor,
    T_BS: Tensor,
    zt_BS: Tensor,
    x0_BS: Tensor,
    alpha_s: Tensor,
    alpha_t: Tensor,
    noise: StationaryNoise,
) -> Tensor:
    """finite_step_kl from four numbers a token: log p_x, 1 - p_x, p_z and T = sum over e != x of
    log1p(p_e / c_s).

    T does not count where alpha_s = 1, nor at k = 0, which needs log p_x alone.
    """
    beta_s, beta_t, step = 1 - alpha_s, 1 - alpha_t, alpha_s - alpha_t
    masked_BS, same_BS = noise.is_mask(zt_BS), zt_BS == x0_BS
    if noise.uniform_ratio == 0:
        return torch.where(masked_BS, -step / beta_t * log_px_BS, 0.0)
    c_s, c_t = noise.floor(alpha_s, beta_s), noise.floor(alpha_t, beta_t)
    # log(p_x + c_s) stays finite where p_x underflows and c_s is 0 (the last step)
    log_fs_BS = torch.logaddexp(log_px_BS, c_s.log().expand_as(log_px_BS))
    B_s = (1 + c_s) * softplus(rest_BS.log() - log_fs_BS, threshold=50)
    B_s = B_s - torch.where(c_s > 0, c_s * T_BS, 0.0)
    rho, tau = noise.uniform_ratio / noise.vocab_size / (alpha_t * (1 + c_t)), (1 + c_s) / (1 + c_t)
    log_odds_BS = (step * rho / alpha_s).log() + rest_BS.log() - log_fs_BS
    same_kl = tau * softplus(log_odds_BS, threshold=50)
    same_kl = same_kl + step * rho * (B_s - torch.log1p(rest_BS / (p_z_BS + c_t)) / alpha_s)
    # tau of a noise token is 0 at alpha_s = 1, where its logarithm may be -inf: their product is 0
    noise_tau = alpha_t * beta_s / (alpha_s * beta_t)
    signal_BS = torch.where(c_s > 0, p_z_BS / (p_z_BS + torch.where(c_s > 0, c_s, 1.0)), 0.0)
    noise_kl = noise_tau * torch.log1p(-step / (beta_t * alpha_s) * signal_BS)
    noise_kl = noise_kl + step / beta_t * (B_s + torch.log1p(p_z_BS / c_t) / alpha_s)
    return torch.where(same_BS, same_kl, torch.where(masked_BS, step / beta_t * B_s, noise_kl))


def prior_kl(alpha_1: Tensor | float, noise: StationaryNoise) -> Tensor:
    """KL(q(z_1 | x) || pi) in nats, float64 of alpha_1's shape; the same for every x. Infinite at k = 0,
    alpha_1 > 0.
    """
    alpha = torch.as_tensor(alpha_1, dtype=torch.float64)
    uniform = noise.uniform_ratio / noise.vocab_size
    if uniform == 0:
        return torch.where(alpha > 0, torch.inf, 0.0).to(alpha)
    q_x = alpha + (1 - alpha) * uniform
    kl: Tensor = q_x * torch.log1p(alpha * (1 / uniform - 1)) + torch.special.xlog1py(1 - q_x, -alpha)
    return kl


def density_from_scalars(
    p_x_BS: Tensor,
    rest_BS: Tensor,
    p_z_BS: Tensor,
    T_BS: Tensor,
    zt_BS: Tensor,
    x0_BS: Tensor,
    alpha: Tensor,
    beta: Tensor,
    dalpha: Tensor,
    noise: StationaryNoise,
) -> Tensor:
    """The density of k > 0 from four numbers a token: p_x, 1 - p_x, p_z and T = sum over e != x of
    log1p(p_e / c).

    1 - p_x comes as the sum of the other probabilities, which keeps its digits where p_x is near 1.
    """
    c = noise.floor(alpha, beta)
    same_BS = zt_BS == x0_BS
    v_BS = rest_BS / (p_x_BS + c)
    # B is a KL: below 0 it is rounding of two equal numbers
    B_BS = ((1 + c) * torch.log1p(v_BS) - c * T_BS).clamp_min(0)
    noise_token_BS = torch.where(noise.is_mask(zt_BS), 0.0, log1p_minus_ratio(p_z_BS / c))
    itakura_saito_BS = torch.where(same_BS, x_minus_log1p(v_BS), noise_token_BS) / alpha
    return -dalpha / beta * torch.where(same_BS, c / (1 + c), 1.0) * (B_BS + itakura_saito_BS)


def x_minus_log1p(x: Tensor) -> Tensor:
    """x - log1p(x) for x >= 0, accurate near 0: with y = x / (2 + x), log1p(x) = 2 (y + y^3/3 + y^5/5 +
    ...).
    """
    y = x / (2 + x)
    square = y * y
    series = torch.full_like(x, 1 / 23)
    for odd in range(21, 1, -2):
        series = series * square + 1 / odd
    return torch.where(x < 0.3, x * y - 2 * y * square * series, x - torch.log1p(x))


def log1p_minus_ratio(u: Tensor) -> Tensor:
    """log1p(u) - u / (1 + u) for u >= 0, accurate near 0."""
    ratio = u / (1 + u)
    return torch.where(u < 0.3, u * ratio - x_minus_log1p(u), torch.log1p(u) - ratio)


def log_probabilities(logits_BSV: Tensor, noise: StationaryNoise) -> Tensor:
    """log p over real tokens, [B, S, V] float32 (float64 stays): -inf at the mask and at the padding
    columns.
    """
    dtype = logits_BSV.dtype if logits_BSV.dtype == torch.float64 else torch.float32
    column_V = torch.arange(logits_BSV.shape[-1], device=logits_BSV.device)
    excluded_V = noise.is_mask(column_V) | (column_V >= noise.vocab_size)
    return logits_BSV.to(dtype).masked_fill(excluded_V, -torch.inf).log_softmax(-1)


def per_token(x_B: Tensor, dtype: torch.dtype) -> Tensor:
    """A [B] tensor as [B, 1]; anything else as it is. In `dtype`."""
    return (x_B[:, None] if x_B.dim() == 1 else x_B).to(dtype)


def gather(values_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    """values[b, s, ids[b, s]], [B, S]."""
    return values_BSV.gather(-1, ids_BS[..., None]).squeeze(-1)


def _others_log1p(p_BSV: Tensor, x0_BS: Tensor, c: Tensor) -> Tensor:
    """T = sum over e != x of log1p(p_e / c), [B, S]."""
    log1p_BSV = torch.log1p(p_BSV / c[..., None])
    return log1p_BSV.scatter(-1, x0_BS[..., None], 0.0).sum(-1)
