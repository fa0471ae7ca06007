"""The reverse step equals Bayes' rule on explicit matrices, and its mixture form equals the dense one."""

import pytest
import torch
from oracle import (
    ALPHAS,
    F64,
    MASK,
    V,
    bayes,
    f64,
    law_of,
    noise_name,
    noises,
    pairs,
    random_logits,
    transition,
)

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.posterior import jump_bound, mixture_weights, posterior

STEPS = [(s, t) for s in (1.0, *ALPHAS) for t in ALPHAS if t < s]


def every_step(noise):
    _, zt = pairs(noise)
    zt = zt.unique()[None]
    p = law_of(random_logits(zt.shape[1]), noise)
    for alpha_s, alpha_t in STEPS:
        yield zt, p, f64(alpha_s), f64(alpha_t)


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
def test_dense_posterior_equals_bayes(noise):
    for zt, p, alpha_s, alpha_t in every_step(noise):
        got = posterior(p, zt, alpha_s, alpha_t, noise)
        want = [bayes(p[0, i], int(z), alpha_s.item(), alpha_t.item(), noise) for i, z in enumerate(zt[0])]
        torch.testing.assert_close(got[0], torch.stack(want), rtol=0, atol=1e-12)
        torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
def test_posterior_of_a_known_token_equals_bayes(noise):
    x0, zt = pairs(noise)
    one_hot = torch.nn.functional.one_hot(x0, V).to(F64)
    for alpha_s, alpha_t in STEPS:
        got = posterior(one_hot, zt, f64(alpha_s), f64(alpha_t), noise)
        want = [bayes(one_hot[0, i], int(z), alpha_s, alpha_t, noise) for i, z in enumerate(zt[0])]
        torch.testing.assert_close(got[0], torch.stack(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
def test_mixture_equals_the_dense_posterior(noise):
    for zt, p, alpha_s, alpha_t in every_step(noise):
        p_zt = p.gather(-1, zt[..., None])[..., 0]
        stay, token, uniform, mask = mixture_weights(p_zt, zt, alpha_s, alpha_t, noise)
        for weight in (stay, token, uniform, mask):
            assert (weight >= 0).all()
        torch.testing.assert_close(stay + token + uniform + mask, torch.ones_like(stay), rtol=0, atol=1e-12)
        assert (1 - stay <= jump_bound(alpha_s, alpha_t) + 1e-15).all()
        mixture = token[..., None] * p + uniform[..., None] / V
        mixture.scatter_add_(-1, zt[..., None], stay[..., None])
        if noise.mask_id is not None:
            mixture[..., noise.mask_id] += mask
        torch.testing.assert_close(mixture, posterior(p, zt, alpha_s, alpha_t, noise), rtol=0, atol=1e-12)


def test_mask_noise_keeps_a_visible_token_of_probability_zero():
    noise = StationaryNoise(0.0, V, MASK)
    p, zt = torch.zeros(1, 1, V, dtype=F64), torch.tensor([[1]])
    p[..., 0] = 1
    alpha_s, alpha_t = f64(0.7), f64(0.4)
    assert posterior(p, zt, alpha_s, alpha_t, noise)[0, 0].tolist() == [0, 1, 0, 0, 0, 0]
    assert [w.item() for w in mixture_weights(p[..., 1], zt, alpha_s, alpha_t, noise)] == [1, 0, 0, 0]


def test_posterior_of_the_mean_is_not_the_mean_of_posteriors():
    """For a visible token and k > 0, "draw x0 from p, then z_s from q(.|z_t, x0)" is another, wrong law."""
    noise = StationaryNoise(0.5, V, MASK)
    p, alpha_s, alpha_t = law_of(random_logits(1), noise)[0, 0], 0.6, 0.3
    for z, differ in ((1, True), (MASK, False)):
        naive = sum(p[x] * bayes(torch.eye(V, dtype=F64)[x], z, alpha_s, alpha_t, noise) for x in range(V))
        right = bayes(p, z, alpha_s, alpha_t, noise)
        assert ((naive - right).abs().max() > 0.01) == differ
    assert transition(alpha_t, noise)[0, 1] > 0
