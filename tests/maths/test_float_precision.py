"""float32 and bfloat16 at the vocabulary sizes that are trained: close to float64, never negative, never
NaN.
"""

import pytest
import torch
from oracle import F64

from xdlm_megatron.diffusion.nelbo import (
    log1p_minus_ratio,
    nelbo_density,
    x_minus_log1p,
)
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

LLADA = 126464
KINDS = 3  # z_t is the mask, x0, another token


def batch(vocab, alphas, logits_KV):
    """One row of [mask, same, noise] tokens for each alpha; x0 = 0 and the noise token = 1."""
    B = len(alphas)
    alpha = torch.tensor(alphas, dtype=F64)
    beta = torch.tensor([1e-3 if a == 1 - 1e-3 else 1 - a for a in alphas], dtype=F64)
    zt = torch.tensor([vocab - 1, 0, 1]).expand(B, KINDS)
    logits = logits_KV.expand(B, KINDS, vocab).contiguous()
    return logits, zt, torch.zeros_like(zt), alpha, beta, torch.full_like(alpha, -0.999)


def loss_and_gradient(loss, logits, *rest):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, *rest)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def normal_logits(vocab, scale=2.0):
    return scale * torch.randn(KINDS, vocab, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocab", [50258, LLADA])
@pytest.mark.parametrize("k", [0.0, 1e-3, 0.1, 1.0])
def test_float32_stays_close_to_float64(vocab, k):
    noise = StationaryNoise(k, vocab, vocab - 1)
    for alpha in (1e-3, 0.5, 1 - 1e-3):
        logits, *rest = batch(vocab, [alpha], normal_logits(vocab).float().double())
        want, want_grad = loss_and_gradient(vocab_parallel_nelbo, logits, *rest, noise)
        # autograd through the readable form cancels a little; the analytic gradient does not
        for loss, tolerance in ((vocab_parallel_nelbo, 2e-6), (nelbo_density, 1e-4)):
            got, got_grad = loss_and_gradient(loss, logits.float(), *rest, noise)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
            size = want_grad.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            assert ((got_grad - want_grad).abs() / size).max() < tolerance


def test_bfloat16_logits_lose_nothing_but_their_own_rounding():
    noise = StationaryNoise(0.1, LLADA, LLADA - 1)
    logits, *rest = batch(LLADA, [1e-3, 1 - 1e-3], normal_logits(LLADA))
    rounded = logits.to(torch.bfloat16)
    for loss in (vocab_parallel_nelbo, nelbo_density):
        got, got_grad = loss_and_gradient(loss, rounded, *rest, noise)
        want, want_grad = loss_and_gradient(loss, rounded.float(), *rest, noise)
        assert torch.equal(got, want)
        assert torch.equal(got_grad, want_grad.to(torch.bfloat16))


def extremes(vocab):
    """Saturated on x0, on another token, on the noise token, flat, and wide normal logits: [KINDS, V]
    each.
    """
    flat = torch.zeros(KINDS, vocab)
    for column in (0, 1, 2):
        for height in (12.0, 80.0, 1e4):
            peaked = flat.clone()
            peaked[:, column] = height
            yield peaked
    yield flat
    yield flat + 3e4
    yield normal_logits(vocab, scale=30.0).float()


@pytest.mark.parametrize("k", [0.0, 1e-12, 1e-3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_negative_and_never_nan(k, dtype):
    noise = StationaryNoise(k, LLADA, LLADA - 1)
    for logits_KV in extremes(LLADA):
        arguments = batch(LLADA, [1e-3, 1 - 1e-3], logits_KV.to(dtype))
        loss, grad = loss_and_gradient(vocab_parallel_nelbo, *arguments, noise)
        assert torch.isfinite(loss).all()
        assert (loss >= 0).all()
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("k", [1e-3, 0.5, 1.0])
def test_small_vocabularies_stay_accurate_where_the_floor_is_large(k):
    """c reaches hundreds: the loss is a small difference there, which float32 must still keep from going
    negative.
    """
    vocab = 6
    noise = StationaryNoise(k, vocab, vocab - 1)
    alphas = [1e-3, 0.01, 0.5, 1 - 1e-3]
    for logits_KV in extremes(vocab):
        logits, *rest = batch(vocab, alphas, logits_KV)
        got = nelbo_density(logits, *rest, noise), vocab_parallel_nelbo(logits, *rest, noise)
        want = nelbo_density(logits.double(), *rest, noise)
        for value in got:
            assert (value >= 0).all()
            torch.testing.assert_close(value.double(), want, rtol=5e-4, atol=1e-4)


def nearly_certain(others, x0_logit):
    """[KINDS, 1003] logits: x0, two others, and next to nothing on the rest."""
    logits_KV = torch.full((KINDS, 1003), -100.0)
    logits_KV[:, 1], logits_KV[:, 2] = others
    logits_KV[:, 0] = x0_logit
    return logits_KV


@pytest.mark.parametrize("k", [0.0, 1e-3, 0.1])
def test_a_nearly_certain_token_keeps_its_digits(k):
    """1 - p_x = 3e-7 here: taken as 1 minus p_x it would have two digits in float32."""
    noise = StationaryNoise(k, 1003, 1002)
    logits, *rest = batch(1003, [0.01, 0.5, 0.9], nearly_certain((14.0, 15.0), 30.0))
    want = vocab_parallel_nelbo(logits.double(), *rest, noise)
    got = vocab_parallel_nelbo(logits, *rest, noise)
    tolerance = 1e-6 if k == 0 else 5e-3
    masked = rest[0] == 1002
    torch.testing.assert_close(got[masked].double(), want[masked], rtol=tolerance, atol=0)


@pytest.mark.parametrize("k", [0.0, 1e-3, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("others", [(14.0, 15.0), (-100.0, 15.0), (15.0, -100.0)])
def test_a_nearly_certain_token_s_gradient_keeps_its_digits(others, k):
    """It vanishes with 1 - p_x, on x0 as on all others; 1 - p_x goes from 0.1 to 1e-7."""
    noise = StationaryNoise(k, 1003, 1002)
    for height in (17.0, 20.0, 22.0, 24.0, 27.0, 29.0, 31.0):
        logits, *rest = batch(1003, [1e-3, 0.01, 0.5, 0.9, 1 - 1e-3], nearly_certain(others, height))
        _, want = loss_and_gradient(nelbo_density, logits.double(), *rest, noise)
        _, got = loss_and_gradient(vocab_parallel_nelbo, logits, *rest, noise)
        size = want.abs().amax(-1)
        assert (size[rest[0] == 1002] > 0).all()
        assert ((got - want).abs().amax(-1) / size.clamp_min(1e-30)).max() < 1e-5


def test_scalar_helpers_are_accurate_near_zero():
    x = torch.logspace(-12, 6, 400, dtype=F64)
    for function in (x_minus_log1p, log1p_minus_ratio):
        assert (function(x) > 0).all()
        relative = (function(x.float()).double() - function(x.float().double())) / function(
            x.float().double()
        )
        assert relative.abs().max() < 2e-6
    small = x[x < 1e-5]
    torch.testing.assert_close(x_minus_log1p(small), small**2 / 2 - small**3 / 3, rtol=1e-9, atol=0)
    torch.testing.assert_close(log1p_minus_ratio(small), small**2 / 2 - 2 * small**3 / 3, rtol=1e-9, atol=0)
    large = x[x > 0.3]
    torch.testing.assert_close(x_minus_log1p(large), large - large.log1p(), rtol=1e-13, atol=0)
