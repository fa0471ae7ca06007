"""One token a step, from left to right: a language model's usual way, which a denoiser may be asked for too.

A row takes as many network calls as it has unknown positions, of whole sequences: nothing is kept between.
"""

import torch

from xdlm_megatron.config.samplers import LeftToRightSampler
from xdlm_megatron.samplers.chain import Chain


def left_to_right(chain: Chain, settings: LeftToRightSampler) -> None:
    """Position by position; a step in which no row has anything to decide is left out."""
    chain.begin(masks=True)
    wanted_BS = chain.free_BS
    position_S = torch.arange(wanted_BS.shape[1], device=wanted_BS.device)
    first_step = chain.step
    for position in wanted_BS.any(0).nonzero()[:, 0].tolist():
        chain.step = first_step + position  # names random numbers: not by what others of the batch left out
        asked_BS = wanted_BS & (position_S == position)
        token_BS, _, _ = chain.tokens(asked_BS, settings.temperature, settings.top_p)
        left = 1 - (position + 1) / len(position_S)
        chain.advance(torch.where(asked_BS, token_BS, chain.z_BS), left, asked_BS.any(1))
