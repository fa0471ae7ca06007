"""The analytic gradient of vocab_parallel_nelbo equals autograd through the brute-force rate matrix."""

import math

import pytest
import torch
from oracle import (
    ALPHAS,
    F64,
    MASK,
    V,
    ctmc_density,
    law_of,
    noise_name,
    noises,
    pairs,
    random_logits,
    rates,
)

from xdlm_megatron.diffusion.nelbo import nelbo_density
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

all_noises = pytest.mark.parametrize("noise", noises(), ids=noise_name)


def gradient(loss, logits, zt, x0, alpha, noise, upstream=None):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, zt, x0, *rates(alpha), noise)
    return torch.autograd.grad(value, leaf, torch.ones_like(value) if upstream is None else upstream)[0]


@all_noises
def test_gradient_equals_autograd_of_brute_force(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    for alpha in ALPHAS:
        got = gradient(vocab_parallel_nelbo, logits, zt, x0, alpha, noise)
        for i, (x, z) in enumerate(zip(x0[0].tolist(), zt[0].tolist(), strict=True)):
            if noise.uniform_ratio == 0 and z != MASK:
                assert (got[0, i] == 0).all()
                continue
            leaf = logits[0, i].clone().requires_grad_()
            ctmc_density(x, law_of(leaf, noise), z, alpha, noise).backward()
            scale = leaf.grad.abs().max().item()
            torch.testing.assert_close(got[0, i], leaf.grad, rtol=1e-9, atol=1e-9 * scale + 1e-12)


@all_noises
def test_gradient_rows_sum_to_zero_and_spare_mask_and_padding(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    logits[..., V] = math.inf  # padding may hold anything
    if noise.mask_id is not None:
        logits[..., MASK] = -math.inf
    for alpha in ALPHAS:
        for loss in (vocab_parallel_nelbo, nelbo_density):
            got = gradient(loss, logits, zt, x0, alpha, noise)
            assert torch.isfinite(got).all()
            assert (got.sum(-1).abs() <= 1e-11 * (1 + got.abs().amax(-1))).all()
            assert (got[..., V:] == 0).all()
            if noise.mask_id is not None:
                assert (got[..., MASK] == 0).all()


@all_noises
def test_readable_and_analytic_gradients_agree_under_token_weights(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1], scale=4)
    upstream = torch.linspace(-1, 2, x0.shape[1], dtype=F64)[None]
    for alpha in ALPHAS:
        want = gradient(nelbo_density, logits, zt, x0, alpha, noise, upstream)
        got = gradient(vocab_parallel_nelbo, logits, zt, x0, alpha, noise, upstream)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10 * want.abs().max().item())


@all_noises
def test_gradient_bounds(noise):
    """Mask rows: 2 / beta; noise rows: (2 + 1 / alpha) / beta; rows of z = x: the same and no more."""
    x0, zt = pairs(noise)
    for scale in (1, 10, 100):
        for alpha in ALPHAS:
            got = gradient(
                vocab_parallel_nelbo, random_logits(x0.shape[1], scale=scale), zt, x0, alpha, noise
            )
            bound = torch.where(zt == MASK, 2.0, 2 + 1 / alpha) / (1 - alpha)
            if noise.mask_id is None:
                bound = torch.full_like(bound, (2 + 1 / alpha) / (1 - alpha))
            assert (got.abs().amax(-1) <= bound * (1 + 1e-9)).all()
