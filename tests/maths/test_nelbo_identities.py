"""The loss equals brute force: finite steps, continuous time, special cases, limits and totals."""

import math
from itertools import pairwise

import pytest
import torch
from oracle import (
    ALPHAS,
    F64,
    MASK,
    RATIOS,
    V,
    bayes,
    ctmc_density,
    f64,
    gauss_legendre,
    kl,
    law_of,
    noise_name,
    noises,
    pairs,
    prior,
    random_logits,
    rates,
    transition,
)

from xdlm_megatron.diffusion.nelbo import finite_step_kl, nelbo_density, prior_kl
from xdlm_megatron.diffusion.noise import StationaryNoise

all_noises = pytest.mark.parametrize("noise", noises(), ids=noise_name)
mixed_noises = pytest.mark.parametrize("noise", [n for n in noises() if n.uniform_ratio > 0], ids=noise_name)


@all_noises
def test_finite_step_kl_equals_the_explicit_sum(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    p, eye = law_of(logits, noise)[0], torch.eye(V, dtype=F64)
    for alpha_t in ALPHAS:
        for alpha_s in (a for a in (1.0, *ALPHAS, alpha_t + 1e-3) if a > alpha_t):
            got = finite_step_kl(logits, zt, x0, f64(alpha_s), f64(alpha_t), noise)
            steps = alpha_s, alpha_t, noise
            want = [
                kl(bayes(eye[x], z, *steps), bayes(p[i], z, *steps)) for i, (x, z) in enumerate(each(x0, zt))
            ]
            torch.testing.assert_close(got[0], torch.stack(want), rtol=1e-10, atol=1e-11)


@all_noises
def test_the_last_step_is_the_reconstruction_term(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1], scale=4)
    p = law_of(logits, noise)[0]
    for alpha_t in ALPHAS:
        got = finite_step_kl(logits, zt, x0, f64(1.0), f64(alpha_t), noise)
        want = [-bayes(p[i], z, 1.0, alpha_t, noise)[x].log() for i, (x, z) in enumerate(each(x0, zt))]
        torch.testing.assert_close(got[0], torch.stack(want), rtol=1e-10, atol=1e-11)


@all_noises
def test_the_last_step_is_finite_where_the_token_underflows(noise):
    logits, x0 = torch.zeros(1, 2, V, dtype=F64), torch.tensor([[0, 0]])
    logits[..., 0] = -800.0
    zt = torch.tensor([[0, 1 if noise.mask_id is None else MASK]])
    got = finite_step_kl(logits, zt, x0, f64(1.0), f64(0.5), noise)
    assert torch.isfinite(got).all()


@all_noises
def test_density_equals_the_rate_matrix_integrand(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    p = law_of(logits, noise)[0]
    for alpha in ALPHAS:
        got = nelbo_density(logits, zt, x0, *rates(alpha, dalpha=-0.7), noise)
        want = [ctmc_density(x, p[i], z, alpha, noise) for i, (x, z) in enumerate(each(x0, zt))]
        torch.testing.assert_close(got[0], 0.7 * torch.stack(want), rtol=1e-10, atol=1e-10)
        assert (got >= 0).all()


@all_noises
def test_density_is_the_limit_of_the_finite_step(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    for alpha in (0.9, 0.5, 0.1):
        density = nelbo_density(logits, zt, x0, *rates(alpha), noise)
        slopes = []
        for step in (1e-3, 5e-4):
            ends = f64(alpha + step), f64(alpha)
            slopes.append(finite_step_kl(logits, zt, x0, *ends, noise) / step)
        torch.testing.assert_close(2 * slopes[1] - slopes[0], density, rtol=2e-3, atol=1e-4)
        error = [(s - density).abs().max() for s in slopes]
        assert error[1] <= 0.6 * error[0] + 1e-9


@mixed_noises
def test_density_is_a_kl_plus_an_itakura_saito_divergence(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    p, pi = law_of(logits, noise)[0], prior(noise)
    for alpha in ALPHAS:
        marginal, want = transition(alpha, noise), []
        for i, (x, z) in enumerate(each(x0, zt)):
            f_x, f_p = marginal[x], p[i] @ marginal
            w = f_x[z] / f_p[z]
            want.append(pi[z] / (alpha * f_x[z]) * (kl(f_x, f_p) + w - 1 - w.log()))
        got = nelbo_density(logits, zt, x0, *rates(alpha), noise)
        torch.testing.assert_close(got[0], torch.stack(want), rtol=1e-10, atol=1e-10)


@mixed_noises
def test_density_equals_the_paper_s_printed_form(noise):
    """Eq. 15 with the limit of Lemma 3.4, sums over all V entries, as the authors' code evaluates it."""
    k, pi = noise.uniform_ratio, prior(noise)
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    p = law_of(logits, noise)[0]
    for alpha in ALPHAS:
        f, want = transition(alpha, noise), []
        for i, (x, z) in enumerate(each(x0, zt)):
            f_x, f_p = f[x], p[i] @ f
            h = (float(x == z) - p[i, z]) / f_p[z] - (f_x[z] / f_p[z]).log() / alpha
            h = h + (f_x[x] / f_p[x]).log() + k * (1 - alpha) / (V * alpha) * (f_x / f_p).log().sum()
            want.append(pi[z] / f_x[z] * h)
        got = nelbo_density(logits, zt, x0, *rates(alpha), noise)
        torch.testing.assert_close(got[0], torch.stack(want), rtol=1e-9, atol=1e-9)


@mixed_noises
def test_finite_step_equals_the_paper_s_printed_form(noise):
    k, pi = noise.uniform_ratio, prior(noise)
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    p, a_s, a_t = law_of(logits, noise)[0], 0.6, 0.35
    f_s, f_t, want = transition(a_s, noise), transition(a_t, noise), []
    for i, (x, z) in enumerate(each(x0, zt)):
        sx, sp, tx, tp = f_s[x], p[i] @ f_s, f_t[x], p[i] @ f_t
        h = a_t / a_s / (a_s - a_t) * sx[z] / pi[z] * (sx[z] * tp[z] / (tx[z] * sp[z])).log()
        h = h - (tx[z] / tp[z]).log() / a_s + (sx[x] / sp[x]).log()
        h = h + k * (1 - a_s) / (V * a_s) * (sx / sp).log().sum()
        want.append((a_s - a_t) * pi[z] / tx[z] * h)
    got = finite_step_kl(logits, zt, x0, f64(a_s), f64(a_t), noise)
    torch.testing.assert_close(got[0], torch.stack(want), rtol=1e-6, atol=1e-7)


def test_ratio_zero_is_mdlm():
    noise = StationaryNoise(0.0, V, MASK)
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1], scale=30)
    logits[:, 0, 0] = -5000.0  # the probability of this token underflows
    real = [e for e in range(V) if e != MASK]
    log_p = torch.full_like(logits, -math.inf)
    log_p[..., real] = logits[..., real].log_softmax(-1)
    for alpha in ALPHAS:
        got = nelbo_density(logits, zt, x0, *rates(alpha, dalpha=-0.3), noise)
        assert torch.isfinite(got).all()
        assert (got[zt != MASK] == 0).all()
        want = -0.3 / (1 - alpha) * log_p.gather(-1, x0[..., None])[..., 0]
        torch.testing.assert_close(got[zt == MASK], want[zt == MASK], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mask_id", [None, MASK])
def test_ratio_one_is_udlm(mask_id):
    """Schiff et al. (arXiv 2412.10193), NELBO on V states with alpha' = -1; the mask's logit is -inf."""
    noise = StationaryNoise(1.0, V, mask_id)
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    p = law_of(logits, noise)[0]
    for alpha in ALPHAS:
        want = []
        for i, (x, z) in enumerate(each(x0, zt)):
            bar_x = V * alpha * torch.eye(V, dtype=F64)[x] + 1 - alpha
            bar_p = V * alpha * p[i] + 1 - alpha
            sum_x = bar_x / bar_x[z] * ((bar_p[z] * bar_x) / (bar_p * bar_x[z])).log()
            want.append((sum_x.sum() - V / bar_x[z] + V / bar_p[z]) / (V * alpha))
        got = nelbo_density(logits, zt, x0, *rates(alpha), noise)
        torch.testing.assert_close(got[0], torch.stack(want), rtol=1e-9, atol=1e-9)


@all_noises
def test_invariances(noise):
    x0, zt = pairs(noise)
    logits = random_logits(x0.shape[1])
    arguments = (*rates(0.4), noise)
    density = nelbo_density(logits, zt, x0, *arguments)
    torch.testing.assert_close(nelbo_density(logits + 7, zt, x0, *arguments), density, rtol=1e-11, atol=1e-12)
    order = torch.tensor([4, 0, 5, 3, 2, 1, 6, 7])  # new id of each old id; the mask stays
    permuted = torch.empty_like(logits)
    permuted[..., order] = logits
    got = nelbo_density(permuted, order[zt], order[x0], *arguments)
    torch.testing.assert_close(got, density, rtol=1e-11, atol=1e-12)
    garbage = logits.clone()
    garbage[..., V:] = 100.0
    if noise.mask_id is not None:
        garbage[..., MASK] = -math.inf
    before = garbage.clone()
    assert torch.equal(nelbo_density(garbage, zt, x0, *arguments), density)
    assert torch.equal(garbage, before)


def test_small_alpha_limit():
    """B -> |one_hot(x) - p|^2 / (2 c) as c grows: mask rows, where the density is B / beta."""
    noise = StationaryNoise(0.5, V, MASK)
    x0 = torch.tensor([[0, 1, 2, 4, 5]])
    zt = torch.full_like(x0, MASK)
    logits = random_logits(5)
    p = law_of(logits, noise)
    square = (torch.nn.functional.one_hot(x0, V) - p).square().sum(-1)
    for alpha, tolerance in ((1e-4, 5e-3), (1e-5, 5e-4)):
        c = (1 - alpha) * 0.5 / (V * alpha)
        B = nelbo_density(logits, zt, x0, *rates(alpha), noise) * (1 - alpha)
        torch.testing.assert_close(B * 2 * c / square, torch.ones_like(B), rtol=0, atol=tolerance)


def expected_density(logits_table, x, alpha_N, noise):
    """E over z_t ~ q(z_t | x) of the density per unit of -alpha, [N]; the output for z is logits_table[z]."""
    N = len(alpha_N)
    zt = torch.arange(V).expand(N, V)
    q = torch.stack([transition(alpha, noise)[x] for alpha in alpha_N])
    tensors = logits_table.expand(N, V, -1), zt, torch.full_like(zt, x)
    density = nelbo_density(*tensors, alpha_N, 1 - alpha_N, -torch.ones_like(alpha_N), noise)
    return (q * torch.where(q > 0, density, 0.0)).sum(-1)


@mixed_noises
def test_discrete_bounds_converge_to_the_integral_and_bound_the_likelihood(noise):
    table, x, alpha_1 = random_logits(V, scale=1)[0], 1, 0.02
    p = law_of(table, noise)
    alpha_N, weight_N = gauss_legendre(200, alpha_1, 1.0)
    limit = prior_kl(alpha_1, noise) + (weight_N * expected_density(table, x, alpha_N, noise)).sum()
    bounds = []
    for steps in (64, 128, 256):
        grid = torch.linspace(1.0, alpha_1, steps + 1, dtype=F64)
        total, chain = prior_kl(alpha_1, noise), prior(noise)
        s_N, t_N = grid[:-1], grid[1:]
        zt = torch.arange(V).expand(steps, V)
        terms = finite_step_kl(table.expand(steps, V, -1), zt, torch.full_like(zt, x), s_N, t_N, noise)
        total = total + sum(transition(t, noise)[x] @ terms[i] for i, t in enumerate(t_N))
        for t, s in pairwise(grid.flip(0).tolist()):
            chain = chain @ torch.stack([bayes(p[z], z, s, t, noise) for z in range(V)])
        assert total >= -chain[x].log() - 1e-12
        bounds.append(total)
    errors = [bound - limit for bound in bounds]
    assert all(0.4 < after / before < 0.6 for before, after in pairwise(errors))
    torch.testing.assert_close(2 * bounds[2] - bounds[1], limit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", RATIOS)
def test_the_true_marginal_scores_its_entropy(k):
    """Independent tokens: the best output is the data's marginal, and the NELBO its entropy, for every k."""
    noise = StationaryNoise(k, V, MASK)
    table = random_logits(1, scale=1)[0].expand(V, -1)
    p = law_of(table, noise)[0]
    alpha_N, weight_N = gauss_legendre(300)
    nelbo = sum(
        p[x] * (weight_N * expected_density(table, x, alpha_N, noise)).sum() for x in range(V) if x != MASK
    )
    torch.testing.assert_close(nelbo, -torch.special.xlogy(p, p).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", RATIOS)
def test_a_uniform_output_scores_log_of_the_real_tokens(k):
    noise = StationaryNoise(k, V, MASK)
    alpha_N, weight_N = gauss_legendre(300)
    nelbo = (weight_N * expected_density(torch.zeros(V, V, dtype=F64), 0, alpha_N, noise)).sum()
    assert nelbo.item() == pytest.approx(math.log(V - 1), rel=1e-5)


@all_noises
def test_prior_kl_equals_the_explicit_sum(noise):
    for alpha in ALPHAS:
        if noise.uniform_ratio > 0:
            want = kl(transition(alpha, noise)[0], prior(noise))
            torch.testing.assert_close(prior_kl(alpha, noise), want, rtol=1e-9, atol=1e-15)
        else:
            assert prior_kl(alpha, noise).item() == math.inf
    assert prior_kl(0.0, noise).item() == 0


def each(x0, zt):
    return zip(x0[0].tolist(), zt[0].tolist(), strict=True)
