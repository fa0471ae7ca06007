"""The sampler draws from the dense posterior, step by step and as a whole chain."""

import pytest
import torch
from oracle import F64, MASK, V, f64, law_of, noise_name, noises, prior, random_logits
from scipy.stats import chisquare

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.posterior import posterior
from xdlm_megatron.diffusion.sampler import Jumper, inverse_cdf, sample, token_law
from xdlm_megatron.diffusion.schedule import LogLinear

ROWS, LENGTH = 200, 250
KEY = (11, Stream.SAMPLE_STEP)


def assert_drawn_from(ids, law):
    counts = torch.bincount(ids.flatten(), minlength=len(law))
    # a law of rounding is no law: states of probability 1e-18 never occur
    possible = law > 1e-12
    assert counts[~possible].sum() == 0
    expected = law[possible] / law[possible].sum() * ids.numel()
    assert possible.sum() == 1 or chisquare(counts[possible], expected).pvalue > 1e-4


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
@pytest.mark.parametrize("alpha_s", [0.35, 0.9, 1.0])
@pytest.mark.parametrize("z", [1, MASK])
def test_one_step_draws_from_the_dense_posterior(noise, alpha_s, z):
    alpha_t = 0.3
    logits = random_logits(1)[0, 0]
    zt = torch.full((ROWS, LENGTH), z)
    jumper = Jumper(
        KEY, 3, torch.arange(ROWS), noise, *(torch.tensor(a, dtype=F64) for a in (alpha_s, alpha_t))
    )
    zs = jumper.jump(logits.expand(ROWS, LENGTH, -1), zt, jumper.may_jump(zt))
    p = law_of(logits, noise)[None, None]
    law = posterior(p, torch.tensor([[z]]), f64(alpha_s), f64(alpha_t), noise)[0, 0]
    assert_drawn_from(zs, law)


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
def test_a_chain_draws_from_the_product_of_posteriors(noise):
    """Every z has its own output, as in a network; the law of the end is prior x P_1 x ... x P_T."""
    table, schedule, steps = random_logits(V)[0], LogLinear(), 4
    counter = (torch.arange(ROWS)[:, None], torch.arange(LENGTH))
    z1 = noise.sample_prior((11, Stream.SAMPLE_PRIOR), counter)
    p, z_all, law = law_of(table, noise)[None], torch.arange(V)[None], prior(noise)
    grid = torch.linspace(1, 1e-5, steps + 1, dtype=F64)
    alphas = [*schedule.alpha(grid).tolist(), 1.0]
    for i in range(steps + 1):
        kernel = posterior(p, z_all, f64(alphas[i + 1]), f64(alphas[i]), noise)[0]
        law = law @ kernel
        if i == steps - 1:
            assert_drawn_from(sample(lambda z: table[z], z1, schedule, steps, noise, KEY, final="none"), law)
    assert_drawn_from(sample(lambda z: table[z], z1, schedule, steps, noise, KEY), law)


def test_inverse_cdf_never_returns_an_impossible_id():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=F64)
    edges = torch.tensor([0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53], dtype=F64)
    assert [inverse_cdf(p, u[None]).item() for u in edges] == [1, 1, 3, 3]
    for scale in (1 / 3, 1.0, 3.0):  # totals that round up or down
        assert inverse_cdf(p * scale, edges[3:]).item() == 3


def test_token_law_temperature_and_nucleus():
    noise = noises()[2]
    logits = random_logits(3)[0]
    p = law_of(logits, noise)
    torch.testing.assert_close(token_law(logits, noise)[:, :V], p)
    tempered = p.sqrt() / p.sqrt().sum(-1, keepdim=True)
    torch.testing.assert_close(token_law(logits, noise, temperature=2.0)[:, :V], tempered)
    for row, whole in zip(token_law(logits, noise, top_p=0.8), p, strict=True):
        order = whole.argsort(descending=True)
        kept = 1 + int((whole[order].cumsum(0)[1:] <= 0.8).sum())
        want = torch.zeros(V, dtype=F64)
        want[order[:kept]] = whole[order[:kept]] / whole[order[:kept]].sum()
        torch.testing.assert_close(row[:V], want)
    greedy = token_law(logits, noise, top_p=1e-9)
    assert greedy.argmax(-1).tolist() == p.argmax(-1).tolist()
    assert greedy.amax(-1).tolist() == [1, 1, 1]
