"""Block by block, from left to right: any sampler, made semi-autoregressive (LLaDA's block_length)."""

from collections.abc import Callable
from typing import Any

import torch

from xdlm_megatron.samplers.chain import Chain


def block_by_block(sampler: Callable[[Chain, Any], None], chain: Chain, settings: Any) -> None:
    """Runs the sampler on settings.block_size positions at a time, with all its steps for each.

    Later blocks are noise meanwhile, earlier ones stay. A row's blocks are counted from its first unknown
    position, behind its prompt.
    """
    unknown_BS = chain.free_BS
    position_S = torch.arange(unknown_BS.shape[1], device=unknown_BS.device)
    first_B = unknown_BS.int().argmax(1)
    block_BS = torch.div(position_S - first_B[:, None], settings.block_size, rounding_mode="floor")
    for block in block_BS[unknown_BS].unique().tolist():
        chain.restrict(block_BS == block, block)
        sampler(chain, settings)
        chain.finish()
