"""dalpha = 0 marks a token without weight: loss 0 and gradient 0 exactly, whatever the rest of it holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from xdlm_megatron.diffusion.head_nelbo import head_nelbo
from xdlm_megatron.diffusion.nelbo import nelbo_density
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

B, S, V, MASK = 2, 6, 11, 4
DEAD = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]], dtype=torch.bool)
RATIOS = [0.0, 1e-3, 0.5, 1.0]


def make_case(k: float, fill: float) -> tuple[Tensor, tuple]:
    """Logits [B, S, 13] and the loss's arguments, rates [B, S]; tokens of DEAD hold `fill` and odd values."""
    generator = torch.Generator().manual_seed(0)
    noise = StationaryNoise(k, V, MASK)
    logits = torch.randn(B, S, 13, dtype=torch.float64, generator=generator)
    x0 = torch.randint(5, V, (B, S), generator=generator)
    zt = torch.where(torch.rand(B, S, generator=generator) < 0.6, MASK, x0)
    alpha = torch.rand(B, S, dtype=torch.float64, generator=generator) * 0.9 + 0.05  # a t for every token
    beta, dalpha = 1 - alpha, torch.full_like(alpha, -0.999)
    logits[DEAD] = fill
    alpha[DEAD], beta[DEAD], dalpha[DEAD] = 1.0, 0.0, 0.0  # a clean token: t = 0
    x0[DEAD] = torch.tensor([MASK, 0, 10, MASK, 3, 5])
    zt[DEAD] = torch.tensor([MASK, 0, 3, 7, MASK, 5])
    return logits, (zt, x0, alpha, beta, dalpha, noise)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", RATIOS)
@pytest.mark.parametrize("loss", [nelbo_density, vocab_parallel_nelbo])
def test_loss_and_gradient_are_zero_and_the_others_untouched(loss, k, fill, dtype) -> None:
    logits, (zt, x0, *rates, noise) = make_case(k, fill)
    leaf = logits.to(dtype).requires_grad_()
    value = loss(leaf, zt, x0, *rates, noise)
    upstream = torch.linspace(-1, 2, B * S).view(B, S).to(value.dtype)
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    assert (value[DEAD] == 0).all()
    assert (grad[DEAD] == 0).all()

    alive = leaf.detach()[~DEAD][None].requires_grad_()
    want = loss(alive, zt[~DEAD][None], x0[~DEAD][None], *(r[~DEAD][None] for r in rates), noise)
    (want_grad,) = torch.autograd.grad(want, alive, upstream[~DEAD][None])
    assert torch.equal(value[~DEAD], want[0])
    assert torch.equal(grad[~DEAD], want_grad[0])


@pytest.mark.parametrize("loss", [nelbo_density, vocab_parallel_nelbo])
def test_a_rate_for_every_token_equals_a_rate_for_every_sequence(loss) -> None:
    logits, (zt, x0, *_, noise) = make_case(0.1, 0.0)
    x0, alpha = torch.full_like(x0, 7), torch.tensor([0.3, 0.8], dtype=torch.float64)
    rates = (alpha, 1 - alpha, torch.full_like(alpha, -0.5))
    per_token = (rate[:, None].expand(B, S) for rate in rates)
    assert torch.equal(loss(logits, zt, x0, *per_token, noise), loss(logits, zt, x0, *rates, noise))


@pytest.mark.parametrize("same_upstream", [True, False])
@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("k", RATIOS)
def test_the_fused_head_multiplies_none_of_them(k, fill, same_upstream) -> None:
    _, rest = make_case(k, 0.0)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, S, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(13, 8, dtype=torch.float64, generator=generator).requires_grad_()
    upstream = torch.ones(B, S, dtype=torch.float64)
    if not same_upstream:
        upstream = torch.linspace(-1, 2, B * S, dtype=torch.float64).view(B, S)
    spoiled = hidden.masked_fill(DEAD[..., None], fill).requires_grad_()
    got = head_nelbo(spoiled, weight, *rest, chunk_tokens=3)
    grad_hidden, grad_weight = torch.autograd.grad(got, (spoiled, weight), upstream)
    leaf = hidden.requires_grad_()
    want = vocab_parallel_nelbo(leaf @ weight.t(), *rest)
    want_hidden, want_weight = torch.autograd.grad(want, (leaf, weight), upstream)
    assert (got[DEAD] == 0).all()
    assert (grad_hidden[DEAD] == 0).all()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_hidden, want_hidden, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_weight, want_weight, rtol=1e-10, atol=1e-10)


def test_a_batch_of_nothing_else() -> None:
    _, (zt, x0, alpha, beta, dalpha, noise) = make_case(0.1, 0.0)
    hidden, weight = torch.randn(B, S, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    loss = head_nelbo(hidden, weight, zt, x0, alpha, beta, torch.zeros_like(dalpha), noise)
    loss.sum().backward()
    assert not loss.any()
    assert not hidden.grad.any()
    assert not weight.grad.any()
