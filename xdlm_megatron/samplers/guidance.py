"""Classifier-free guidance: more of what the observed tokens say, by a second network call without them.

logits = (1 + scale) conditional - scale unconditional, before anything is drawn: denoiser-space guidance, as
LLaDA's and MDLM's. Without the condition the observed positions hold noise of the stationary law, which is
the mask for mask noise.
"""

import torch
from torch import Tensor

from xdlm_megatron.diffusion.prediction import Denoise, Prediction, as_prediction


def guide(network: Denoise, scale: float, observed_BS: Tensor, prior_BS: Tensor) -> Denoise:
    """`network` itself for a scale of 0 and where nothing is observed: there is no condition to favour."""
    known_BS = observed_BS >= 0
    if scale == 0 or not known_BS.any():
        return network

    def guided(zt_BS: Tensor) -> Prediction:
        conditional = as_prediction(network(zt_BS))
        return conditional.guided(as_prediction(network(torch.where(known_BS, prior_BS, zt_BS))), scale)

    return guided
