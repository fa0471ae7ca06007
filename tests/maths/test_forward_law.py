"""The forward process: the matrices compose, pi is stationary, corrupt() draws from alpha x0 + beta pi."""

import pytest
import torch
from oracle import ALPHAS, F64, V, noise_name, noises, prior, transition
from scipy.stats import chisquare

from xdlm_megatron.diffusion.counter_rng import Stream


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
def test_transitions_compose_and_keep_the_prior(noise):
    torch.testing.assert_close(noise.prior_law(), prior(noise), rtol=0, atol=1e-15)
    for alpha_s in ALPHAS:
        for alpha_t in (a for a in ALPHAS if a < alpha_s):
            composed = transition(alpha_s, noise) @ transition(alpha_t / alpha_s, noise)
            torch.testing.assert_close(composed, transition(alpha_t, noise), rtol=0, atol=1e-14)
            torch.testing.assert_close(
                prior(noise) @ transition(alpha_t, noise), prior(noise), rtol=0, atol=1e-14
            )


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
@pytest.mark.parametrize("alpha", [0.7, 0.05])
def test_corrupt_draws_from_the_marginal(noise, alpha):
    samples, length, x = 200, 1000, 1
    x0 = torch.full((samples, length), x)
    counter = (torch.arange(samples)[:, None], torch.arange(length))
    zt = noise.corrupt(x0, torch.full((samples,), alpha, dtype=F64), (7, Stream.NOISE), counter)
    expected = transition(alpha, noise)[x] * zt.numel()
    counts = torch.bincount(zt.flatten(), minlength=V)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], expected[possible]).pvalue > 1e-4


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
def test_sample_prior_draws_from_pi(noise):
    counter = (torch.arange(200)[:, None], torch.arange(1000))
    z1 = noise.sample_prior((7, Stream.SAMPLE_PRIOR), counter)
    assert z1.shape == (200, 1000)
    counts, expected = torch.bincount(z1.flatten(), minlength=V), prior(noise) * z1.numel()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() == 1 or chisquare(counts[possible], expected[possible]).pvalue > 1e-4
