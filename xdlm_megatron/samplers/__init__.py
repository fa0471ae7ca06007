"""Samplers: how a trained network makes text. docs/sampling.md describes each; a new one is a file here, a
section in config/schema.py and a line in SAMPLERS.

Shape suffixes: B batch, S sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xdlm_megatron.config.samplers import AnySampler
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.prediction import Denoise
from xdlm_megatron.diffusion.schedule import Schedule
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, Draw
from xdlm_megatron.samplers.ancestral import ancestral
from xdlm_megatron.samplers.blocks import block_by_block
from xdlm_megatron.samplers.chain import Chain, Counted, OnStep
from xdlm_megatron.samplers.confidence import confidence
from xdlm_megatron.samplers.guidance import guide
from xdlm_megatron.samplers.left_to_right import left_to_right
from xdlm_megatron.samplers.refine import refine
from xdlm_megatron.samplers.remdm import remdm, remdm_loop
from xdlm_megatron.samplers.saber import saber

SAMPLERS: dict[str, Callable[[Chain, Any], None]] = {
    "ancestral": ancestral,
    "confidence": confidence,
    "refine": refine,
    "remdm": remdm,
    "remdm_loop": remdm_loop,
    "saber": saber,
    "left_to_right": left_to_right,
}


@dataclass(frozen=True)
class Sampled:
    """What came of a batch.

    ids_BS: int64. evaluations_B: int64, network calls that each row needed; rows of a batch share calls, and
    a row that needs none in a step has none counted. steps_B: int64, steps of the sampler that each row took
    part in. last_change_BS: int64, the step (from 1) that last changed a position, 0 where none did.
    """

    ids_BS: Tensor
    evaluations_B: Tensor
    steps_B: Tensor
    last_change_BS: Tensor


@torch.no_grad()
def sample(
    denoise: Denoise,
    settings: AnySampler,
    noise: StationaryNoise,
    schedule: Schedule,
    seed: int,
    observed_BS: Tensor,
    row_B: Tensor | None = None,
    *,
    draw: Draw = REFERENCE_DRAW,
    on_step: OnStep | None = None,
) -> Sampled:
    """Fills the unknown positions of observed_BS by the sampler that `settings`, a recipe's section, names.

    observed_BS: int64 ids, -1 where unknown; observed ids never change. row_B: int64 [B] in [0, 2^32), names
    the rows for the random numbers (default 0..B-1): what a row becomes does not depend on its batch. draw:
    what reads the logits. on_step(t, z_BS): called with the start (t = 1) and after every step; t falls to 0,
    in each block anew.

    Raises:
        ValueError: the sampler needs masks and the noise has none, or the network's output is NaN.
    """
    if row_B is None:
        row_B = torch.arange(len(observed_BS), device=observed_BS.device)
    position_S = torch.arange(observed_BS.shape[1], device=observed_BS.device)
    prior_BS = noise.sample_prior((seed, Stream.SAMPLE_PRIOR), (row_B[:, None], position_S))
    network = Counted(denoise)
    guided = guide(network, settings.guidance_scale, observed_BS, prior_BS)
    chain = Chain(network, guided, noise, schedule, seed, prior_BS, observed_BS, row_B, draw, on_step)
    sampler = SAMPLERS[settings.kind]
    if settings.block_size is None:
        sampler(chain, settings)
    else:
        block_by_block(sampler, chain, settings)
    return Sampled(chain.z_BS, chain.evaluations_B, chain.steps_B, chain.last_change_BS)
