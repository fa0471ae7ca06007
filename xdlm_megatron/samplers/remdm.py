"""Re-masking at random: ReMDM (arXiv 2503.00307), for networks that can fill masks.

From t to s a visible token is masked again with probability sigma, and a mask becomes a token of p with
probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t): the marginals are those of mask noise for every
sigma up to min(1, (1 - alpha_s) / alpha_t). What uniform noise the network knows is not drawn from.
"""

from itertools import pairwise

import torch
from torch import Tensor

from xdlm_megatron.config.schema import RemdmSampler
from xdlm_megatron.samplers.chain import Chain


def remdm(chain: Chain, settings: RemdmSampler) -> None:
    """num_steps equal steps of t from 1 to 0; the last one fills every mask.

    The strategy says what sigma is: `cap` min(eta, bound), `rescale` eta times the bound, `conf` that of
    `cap` shared out among the visible tokens by softmax(-psi), psi a token's probability when it was drawn.
    """
    chain.begin(masks=True)
    times = torch.linspace(1, 0, settings.num_steps + 1, dtype=torch.float64)
    alphas = chain.schedule.alpha(times)
    alphas[-1] = 1
    psi_BS = torch.zeros_like(chain.z_BS, dtype=torch.float64)
    for (t, s), (alpha_t, alpha_s) in zip(pairwise(times.tolist()), pairwise(alphas.tolist()), strict=True):
        bound = min(1.0, (1 - alpha_s) / alpha_t)
        sigma = settings.eta * bound if settings.strategy == "rescale" else min(settings.eta, bound)
        sigma = sigma if t <= settings.remask_below_t else 0.0
        masked_BS, visible_BS = chain.masked_BS, chain.free_BS & ~chain.masked_BS
        sigma_BS = visible_BS.double() * sigma
        if settings.strategy == "conf":
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
