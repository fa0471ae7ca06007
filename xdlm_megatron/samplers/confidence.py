"""From all masks, the surest tokens first: LLaDA's low-confidence re-masking (arXiv 2502.09992, algorithm 5).

A step draws a token for every mask and keeps those of highest probability; the masks are split evenly over
the steps. A token that is kept stays.
"""

import torch
from torch import Tensor

from xdlm_megatron.config.samplers import ConfidenceSampler
from xdlm_megatron.samplers.chain import Chain


def confidence(chain: Chain, settings: ConfidenceSampler) -> None:
    """num_steps steps; a row with fewer masks than steps takes one a step and is done sooner."""
    chain.begin(masks=True)
    share_BT = even_split(chain.masked_BS.sum(1), settings.num_steps)
    for step, count_B in enumerate(share_BT.unbind(1), start=1):
        asked_BS = chain.masked_BS & (count_B > 0)[:, None]
        token_BS, p_BS, _ = chain.tokens(asked_BS, settings.temperature, settings.top_p)
        kept_BS = highest(p_BS, asked_BS, count_B)
        chain.advance(torch.where(kept_BS, token_BS, chain.z_BS), 1 - step / settings.num_steps, count_B > 0)


def even_split(total_B: Tensor, parts: int) -> Tensor:
    """int64 [B, parts] that sum to total_B; the first ones are larger by one where it does not divide."""
    part_T = torch.arange(parts, device=total_B.device)
    return total_B[:, None] // parts + (part_T < (total_B % parts)[:, None])


def highest(score_BS: Tensor, among_BS: Tensor, count_B: Tensor) -> Tensor:
    """bool [B, S]: in each row the count_B positions of highest score among those of among_BS, bool; the
    first of equals, and all where there are fewer.
    """
    order_BS = torch.where(among_BS, score_BS, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_S = torch.arange(score_BS.shape[1], device=score_BS.device)
    chosen_BS = torch.zeros_like(among_BS).scatter(1, order_BS, rank_S < count_B[:, None])
    return chosen_BS & among_BS
