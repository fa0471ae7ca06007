"""Re-masking at random: ReMDM (arXiv 2503.00307), for networks that can fill masks.

From t to s a visible token is masked again with probability sigma, and a mask becomes a token of p with
probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t): the marginals are those of mask noise for every
sigma up to min(1, (1 - alpha_s) / alpha_t). What uniform noise the network knows is not drawn from.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from xdlm_megatron.config.samplers import RemdmLoopSampler, RemdmSampler
from xdlm_megatron.samplers.chain import Chain


def remdm(chain: Chain, settings: RemdmSampler) -> None:
    """num_steps equal steps of t from 1 to 0; the last one fills every mask.

    The strategy says what sigma is: `cap` min(eta, bound), `rescale` eta times the bound, `conf` that of
    `cap` shared out among the visible tokens by softmax(-psi), psi a token's probability when it was drawn.
    """

    def sigma(t: float, bound: float) -> float:
        if t > settings.remask_below_t:
            return 0.0
        return settings.eta * bound if settings.strategy == "rescale" else min(settings.eta, bound)

    _reverse(chain, settings, chain.schedule.alpha, sigma, by_doubt=settings.strategy == "conf")


def remdm_loop(chain: Chain, settings: RemdmLoopSampler) -> None:
    """Fills to a share alpha_on of tokens, masks and fills again at that share, fills the rest.

    num_steps equal steps of t from 1 to 0: alpha rises on a line to alpha_on at t_on, is held there down to
    t_off, and rises on a line to 1. Re-masking belongs to the part between, by sigma = min(eta, bound).
    """
    on, off, held = settings.t_on, settings.t_off, settings.alpha_on

    def alpha(t_T: Tensor) -> Tensor:
        filling_T, finishing_T = ((1 - t_T) / (1 - on)).clamp(max=1), (1 - t_T / off).clamp(min=0)
        return held * filling_T + (1 - held) * finishing_T

    _reverse(chain, settings, alpha, lambda t, bound: min(settings.eta, bound) if off < t <= on else 0.0)


def _reverse(
    chain: Chain,
    settings: RemdmSampler | RemdmLoopSampler,
    alpha: Callable[[Tensor], Tensor],
    sigma_of: Callable[[float, float], float],
    by_doubt: bool = False,
) -> None:
    """The reverse process along alpha(t); sigma_of(t, its largest value) says what is masked again, by_doubt
    that the visible tokens share one sigma.
    """
    chain.begin(masks=True)
    times = torch.linspace(1, 0, settings.num_steps + 1, dtype=torch.float64)
    alphas = alpha(times)
    alphas[-1] = 1
    psi_BS = torch.zeros_like(chain.z_BS, dtype=torch.float64)
    for (t, s), (alpha_t, alpha_s) in zip(pairwise(times.tolist()), pairwise(alphas.tolist()), strict=True):
        sigma = sigma_of(t, min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0)
        masked_BS, visible_BS = chain.masked_BS, chain.free_BS & ~chain.masked_BS
        sigma_BS = visible_BS.double() * sigma
        if by_doubt:
            sigma_BS, sigma = sigma_BS * _shares(psi_BS, visible_BS), 0.0
        u_BS = chain.uniforms()
        filled_BS = masked_BS & (u_BS < (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
        token_BS, p_BS, _ = chain.tokens(filled_BS, settings.temperature, settings.top_p)
        psi_BS = torch.where(filled_BS, p_BS, psi_BS)
        new_BS = torch.where(filled_BS, token_BS, chain.z_BS)
        chain.advance(torch.where(u_BS < sigma_BS, chain.mask_id, new_BS), s)


def _shares(psi_BS: Tensor, visible_BS: Tensor) -> Tensor:
    """softmax(-psi) over each row's visible positions, 0 elsewhere."""
    weight_BS = torch.where(visible_BS, (-psi_BS).exp(), 0.0)
    return weight_BS / weight_BS.sum(1, keepdim=True).clamp_min(1e-300)
