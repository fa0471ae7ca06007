"""Fill and refine: LLaDA-XDLM's sampler (XDLM, arXiv 2602.01362, algorithm 1), whose mistakes can be mended.

A step fills masks as confidence.py does, then overwrites visible tokens with ones that the network now finds
at least as likely. Refinements are to fills as uniform noise is to masks: k / (1 - k) of them in all. Prompts
are visible too, but not free, so that they are neither rewritten nor counted.
"""

import torch
from torch import Tensor

from xdlm_megatron.config.samplers import RefineSampler
from xdlm_megatron.samplers.chain import Chain
from xdlm_megatron.samplers.confidence import even_split, highest


def refine(chain: Chain, settings: RefineSampler) -> None:
    """num_steps steps of filling and refining; what a step leaves of the refinements later ones may use."""
    chain.begin(masks=True)
    k = chain.noise.uniform_ratio if settings.refine_ratio is None else settings.refine_ratio
    fills_BT = even_split(chain.masked_BS.sum(1), settings.num_steps)
    allowed_BT = (fills_BT.cumsum(1).double() * (k / (1 - k)) + 1e-9).floor().long()
    spent_B = torch.zeros_like(chain.row_B)
    for step in range(settings.num_steps):
        fills_B, left_B = fills_BT[:, step], allowed_BT[:, step] - spent_B
        masked_BS, visible_BS = chain.masked_BS, chain.free_BS & ~chain.masked_BS
        asked_BS = _where(masked_BS, fills_B) | _where(visible_BS, left_B)
        token_BS, p_BS, p_present_BS = chain.tokens(asked_BS, settings.temperature, settings.top_p)
        filled_BS = highest(p_BS, masked_BS, fills_B)
        better_BS = visible_BS & (token_BS != chain.z_BS) & (p_BS >= p_present_BS)
        refined_BS = highest(p_BS, better_BS, left_B)
        spent_B = spent_B + refined_BS.sum(1)
        new_BS = torch.where(filled_BS | refined_BS, token_BS, chain.z_BS)
        chain.advance(new_BS, 1 - (step + 1) / settings.num_steps, asked_BS.any(1))


def _where(among_BS: Tensor, count_B: Tensor) -> Tensor:
    """among_BS in the rows that may change any of them."""
    return among_BS & (count_B > 0)[:, None]
