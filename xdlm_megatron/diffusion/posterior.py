"""The reverse step p_theta(z_s | z_t) = q(z_s | z_t, x0 := p) to read: dense, and as a mixture of four laws.
posterior_draw.py draws from it.

Source: XDLM (arXiv 2602.01362), Lemma 3.3; the mixture is derived in docs/maths.md. beta is taken as 1 -
alpha, so these are float64 affairs. s < t, alpha_s > alpha_t; alpha_s = 1 is the noise removal step.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

import torch
from torch import Tensor

from xdlm_megatron.diffusion.nelbo import gather, log_probabilities, per_token
from xdlm_megatron.diffusion.noise import StationaryNoise


def posterior(
    x_theta_BSV: Tensor, zt_BS: Tensor, alpha_s_B: Tensor, alpha_t_B: Tensor, noise: StationaryNoise
) -> Tensor:
    """p_theta(z_s | z_t) over all V states, [B, S, V] in x_theta's dtype.

    x_theta_BSV: probabilities of the clean token, 0 at the mask (V = noise.vocab_size columns). zt_BS:
    int64. alpha_s_B, alpha_t_B: float [B] or broadcastable to [B, S]. Bayes' rule: f_s(p, e) f_{t|s}(e, z)
    / f_t(p, z) with f(p, e) = alpha p_e + beta pi_e. At k = 0 a visible token keeps its value, whatever its
    probability.
    """
    dtype = x_theta_BSV.dtype
    alpha_s, alpha_t = per_token(alpha_s_B, dtype)[..., None], per_token(alpha_t_B, dtype)[..., None]
    alpha_ts = alpha_t / alpha_s
    pi_V = noise.prior_law(x_theta_BSV.device).to(dtype)
    pi_z_BS1 = pi_V[zt_BS][..., None]
    stays_BSV = torch.zeros_like(x_theta_BSV).scatter(-1, zt_BS[..., None], 1.0)
    f_s_BSV = alpha_s * x_theta_BSV + (1 - alpha_s) * pi_V
    f_ts_BSV = alpha_ts * stays_BSV + (1 - alpha_ts) * pi_z_BS1
    f_t_BS1 = alpha_t * gather(x_theta_BSV, zt_BS)[..., None] + (1 - alpha_t) * pi_z_BS1
    return torch.where(pi_z_BS1 > 0, f_s_BSV * f_ts_BSV / f_t_BS1, stays_BSV)


def mixture_weights(
    p_zt_BS: Tensor, zt_BS: Tensor, alpha_s_B: Tensor, alpha_t_B: Tensor, noise: StationaryNoise
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The posterior as a mixture: weights (stay, token, uniform, mask), float64, each [B, S]; they sum to 1.

    z_s is z_t with weight `stay`, a draw from p with `token`, a uniform draw over all V ids with `uniform`,
    the mask with `mask`. Only p_zt_BS, the probability of the present id, is needed of the network (ignored
    where z_t is the mask). A position that does not stay is redrawn from the forward marginal at s of x0 ~
    p.
    """
    alpha_s, alpha_t = per_token(alpha_s_B, torch.float64), per_token(alpha_t_B, torch.float64)
    masked_BS, k = noise.is_mask(zt_BS), noise.uniform_ratio
    c = noise.floor(alpha_t, 1 - alpha_t)
    # probability that a visible token is noise; certain for the mask, impossible at k = 0
    noise_BS = (
        c / (p_zt_BS.to(torch.float64) + c) if k > 0 else torch.zeros_like(p_zt_BS, dtype=torch.float64)
    )
    jump_BS = jump_bound(alpha_s, alpha_t) * torch.where(masked_BS, 1.0, noise_BS)
    beta_s = 1 - alpha_s
    return 1 - jump_BS, jump_BS * alpha_s, jump_BS * beta_s * k, jump_BS * beta_s * (1 - k)


def jump_bound(alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
    """Largest probability that a position changes, whatever the network says: beta_{t|s} / beta_t, at most
    1.
    """
    return ((alpha_s - alpha_t) / (alpha_s * (1 - alpha_t))).clamp_max(1.0)


def token_law(
    logits_NV: Tensor, noise: StationaryNoise, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """p over the clean token, float64 [N, V]: mask and padding at 0, tempered, cut to the nucleus, summing
    to 1. The nucleus is the most probable token and those whose cumulative probability stays within top_p.
    """
    p_NV = log_probabilities(logits_NV.to(torch.float64) / temperature, noise).exp()
    if top_p >= 1:
        return p_NV
    sorted_NV, order_NV = p_NV.sort(stable=True, dim=-1, descending=True)
    kept_NV = sorted_NV.cumsum(-1) <= top_p
    kept_NV[:, 0] = True
    p_NV = torch.zeros_like(p_NV).scatter(-1, order_NV, torch.where(kept_NV, sorted_NV, 0.0))
    return p_NV / p_NV.sum(-1, keepdim=True)
