"""Ancestral sampling: the reverse process, by the draws of diffusion/posterior_draw.py.

Random numbers decide first which positions could change at all; the network is asked about those alone, and
not at all in a step that has none. uniform_ratio 0 is MDLM's sampler, 1 is UDLM's.
"""

from functools import partial
from itertools import pairwise

import torch

from xdlm_megatron.config.samplers import AncestralSampler
from xdlm_megatron.diffusion.posterior_draw import ReverseStep
from xdlm_megatron.diffusion.prediction import most_probable
from xdlm_megatron.samplers.chain import Chain


def ancestral(chain: Chain, settings: AncestralSampler) -> None:
    """num_steps equal steps of t from 1 to t_end, and the noise removal."""
    chain.begin(masks=False)
    times = torch.linspace(1, settings.t_end, settings.num_steps + 1, dtype=torch.float64)
    alphas = chain.schedule.alpha(times)
    if settings.final == "ancestral":  # one more step, to alpha = 1
        times, alphas = torch.cat([times, times.new_zeros(1)]), torch.cat([alphas, alphas.new_ones(1)])
    for t, (alpha_t, alpha_s) in zip(times[1:].tolist(), pairwise(alphas), strict=True):
        reverse = ReverseStep(
            chain.key,
            chain.step,
            chain.row_B,
            chain.noise,
            alpha_s,
            alpha_t,
            settings.temperature,
            settings.top_p,
            chain.draw,
        )
        zs_BS, undecided_BS = reverse.settle(chain.z_BS, chain.free_BS)
        picked_BS = chain.read(undecided_BS, partial(reverse.pick, chain.z_BS))[0].long()
        chain.advance(torch.where(undecided_BS, picked_BS, zs_BS), t)
    if settings.final == "greedy":
        chain.advance(chain.read(chain.free_BS, partial(most_probable, chain.noise))[0].long(), 0.0)
