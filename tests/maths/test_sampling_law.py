"""The sampler draws from the dense posterior, step by step and as a whole chain."""

import math
from functools import partial

import pytest
import torch
from oracle import F64, MASK, V, assert_drawn_from, f64, law_of, noise_name, noises, prior, random_logits

from xdlm_megatron.config.samplers import AncestralSampler
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.posterior import posterior, token_law
from xdlm_megatron.diffusion.posterior_draw import ReverseStep
from xdlm_megatron.diffusion.prediction import Logits
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.diffusion.token_race import ChosenRows, Counters, draw_shard
from xdlm_megatron.samplers import sample

ROWS, LENGTH = 200, 250
KEY = (11, Stream.SAMPLE_STEP)


def one_step(logits, z, noise, alpha_s, alpha_t, **reshaped):
    """ROWS x LENGTH draws of z_s at one z and one row of logits."""
    zt = torch.full((ROWS, LENGTH), z)
    alphas = (torch.tensor(a, dtype=F64) for a in (alpha_s, alpha_t))
    step = ReverseStep(KEY, 3, torch.arange(ROWS), noise, *alphas, **reshaped)
    zs, undecided = step.settle(zt, torch.ones_like(zt, dtype=torch.bool))
    return Logits(logits.expand(ROWS, LENGTH, -1)).replace(zs, undecided, partial(step.pick, zt))


def dense(p, z, noise, alpha_s, alpha_t):
    return posterior(p[None, None], torch.tensor([[z]]), f64(alpha_s), f64(alpha_t), noise)[0, 0]


def laws_of(logits):
    """A likely and an unlikely token: a visible z that the model takes for signal, and for noise."""
    return [int(i) for i in (logits[:MASK].argmax(), logits[:MASK].argmin())]


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
@pytest.mark.parametrize("alpha_s", [0.35, 0.9, 1.0])
def test_one_step_draws_from_the_dense_posterior(noise, alpha_s):
    logits = random_logits(1)[0, 0]
    for z in (MASK, *laws_of(logits)):
        law = dense(law_of(logits, noise), z, noise, alpha_s, 0.3)
        assert_drawn_from(one_step(logits, z, noise, alpha_s, 0.3), law)


@pytest.mark.parametrize(
    "noise", [n for n in noises() if n.uniform_ratio in (0.0, 0.1, 0.5, 1.0)], ids=noise_name
)
@pytest.mark.parametrize("alpha_s", [0.5, 1.0])
@pytest.mark.parametrize(
    "reshaped", [{"temperature": 0.6}, {"top_p": 0.8}, {"temperature": 1.7, "top_p": 0.7}]
)
def test_temperature_and_nucleus_come_before_the_posterior(noise, alpha_s, reshaped):
    logits = random_logits(1)[0, 0]
    p = token_law(logits[None], noise, **reshaped)[0, :V]
    for z in (MASK, *laws_of(logits)):
        if noise.uniform_ratio == 0 and z != MASK:
            continue  # the dense form has 0 / 0 where a token outside the nucleus cannot be noise
        law = dense(p, z, noise, alpha_s, 0.3)
        assert_drawn_from(one_step(logits, z, noise, alpha_s, 0.3, **reshaped), law)


@pytest.mark.parametrize(
    ("size", "columns", "dtype", "draws"),
    [(32003, 32128, torch.float32, 6000), (126464, 126464, torch.bfloat16, 2000)],
)
def test_tokens_of_a_large_vocabulary_follow_the_float64_law(size, columns, dtype, draws):
    """Ids in 50 classes of about equal probability by the float64 CDF, from the most to the least likely."""
    noise = StationaryNoise(0.1, size, 4)
    logits = 3 * torch.randn(columns, generator=torch.Generator().manual_seed(0))
    logits[4], logits[size:] = 40, 40
    logits = logits.to(dtype)
    index = torch.zeros(draws, dtype=torch.int64)
    counters = Counters(KEY, 0, torch.arange(draws), index)
    _, ids, signal = draw_shard(ChosenRows(logits[None], index, index + 7, counters, Shard(noise)))
    p = law_of(logits, noise)
    order = p.argsort(descending=True)
    classes = torch.empty_like(order)
    classes[order] = (p[order].cumsum(0) * 50).long().clamp_max(49)
    law = torch.zeros(50, dtype=F64).scatter_add_(0, classes, p)
    assert_drawn_from(classes[ids.long()], law)
    torch.testing.assert_close(signal, logits[7].double().expand(draws) / math.log(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", noises(), ids=noise_name)
def test_a_chain_draws_from_the_product_of_posteriors(noise):
    """Every z has its own output, as in a network; the law of the end is prior x P_1 x ... x P_T."""
    table, schedule, steps = random_logits(V)[0], LogLinear(), 4
    unknown = torch.full((ROWS, LENGTH), -1)

    def ends(final):
        settings = AncestralSampler(num_steps=steps, final=final)
        return sample(lambda z: table[z], settings, noise, schedule, 11, unknown).ids_BS

    p, z_all, law = law_of(table, noise)[None], torch.arange(V)[None], prior(noise)
    grid = torch.linspace(1, 1e-5, steps + 1, dtype=F64)
    alphas = [*schedule.alpha(grid).tolist(), 1.0]
    for i in range(steps + 1):
        kernel = posterior(p, z_all, f64(alphas[i + 1]), f64(alphas[i]), noise)[0]
        law = law @ kernel
        if i == steps - 1:
            assert_drawn_from(ends("none"), law)
    assert_drawn_from(ends("ancestral"), law)


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
