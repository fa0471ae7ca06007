import pytest
import torch

from xdlm_megatron.diffusion import row_ops
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

NOISE = StationaryNoise(0.1, 11, 4)


def arguments(B=3, S=5, columns=13, noise=NOISE):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(5, 11, (B, S), generator=generator)
    zt = torch.randint(0, 11, (B, S), generator=generator)
    alpha = torch.linspace(0.2, 0.8, B)
    logits = torch.randn(B, S, columns, generator=generator)
    return logits, (zt, x0, alpha, 1 - alpha, -torch.ones(B), noise)


def test_in_place_gradient_overwrites_the_logits_and_forbids_a_second_backward():
    logits, rest = arguments()
    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(vocab_parallel_nelbo(leaf, *rest).sum(), leaf)

    leaf = logits.clone().requires_grad_()
    shard = leaf * 1
    loss = vocab_parallel_nelbo(shard, *rest, grad_in_place=True).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, want)
    assert torch.equal(shard.detach(), want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_it_the_logits_survive():
    logits, rest = arguments()
    leaf = logits.clone().requires_grad_()
    loss = vocab_parallel_nelbo(leaf, *rest).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(leaf.detach(), logits)


@pytest.mark.parametrize("grad_in_place", [False, True])
def test_the_transposed_layout_is_read_and_written_where_it_lies(grad_in_place):
    logits, rest = arguments()
    leaf = logits.clone().requires_grad_()
    want = vocab_parallel_nelbo(leaf, *rest)
    want.sum().backward()

    seen = []
    ops = REFERENCE._replace(stats=spy(REFERENCE.stats, seen))
    stored_SBP = logits.transpose(0, 1).contiguous().requires_grad_()
    shard = stored_SBP * 1
    got = vocab_parallel_nelbo(shard.transpose(0, 1), *rest, grad_in_place=grad_in_place, ops=ops)
    got.sum().backward()
    assert torch.equal(got, want)
    assert torch.equal(stored_SBP.grad.transpose(0, 1), leaf.grad)
    assert seen == [shard.data_ptr()]
    assert torch.equal(shard.detach(), stored_SBP.grad) == grad_in_place


def spy(function, pointers):
    def spying(logits_NP, *rest):
        pointers.append(logits_NP.data_ptr())
        return function(logits_NP, *rest)

    return spying


@pytest.mark.parametrize("elements", [1, 26, 40])
@pytest.mark.parametrize("k", [0.0, 0.1])
def test_row_chunks_do_not_change_a_bit(elements, k, monkeypatch):
    logits, rest = arguments(noise=StationaryNoise(k, 11, 4))

    def both():
        leaf = logits.clone().requires_grad_()
        loss = vocab_parallel_nelbo(leaf, *rest)
        loss.sum().backward()
        return loss, leaf.grad

    want = both()
    monkeypatch.setitem(row_ops.SCRATCH_ELEMENTS, "cpu", elements)
    for got, expected in zip(both(), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("k", [0.0, 0.1])
def test_a_row_of_nan_is_harmless_where_no_gradient_comes(k):
    logits, rest = arguments(noise=StationaryNoise(k, 11, 4))
    logits[1, 2] = torch.nan
    weight = torch.ones(3, 5)
    weight[1, 2] = 0
    leaf = logits.clone().requires_grad_()
    loss = vocab_parallel_nelbo(leaf, *rest)
    torch.where(weight > 0, loss, 0.0).sum().backward()
    assert (leaf.grad[1, 2] == 0).all()
    assert torch.isfinite(leaf.grad).all()


def test_gradient_of_16_bit_logits_is_rounded_once():
    logits, rest = arguments()
    upstream = torch.rand(3, 5)
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = logits.bfloat16().to(dtype).requires_grad_()
        grads += torch.autograd.grad(vocab_parallel_nelbo(leaf, *rest), leaf, upstream)
    assert torch.equal(grads[0], grads[1].bfloat16())


def test_a_layout_that_needs_a_copy_teaches():
    logits, rest = arguments()
    with pytest.raises(
        ValueError, match=r"must be contiguous as \[B, S, P\] or as \[S, B, P\]; call .contiguous"
    ):
        vocab_parallel_nelbo(logits.repeat(1, 1, 2)[..., ::2], *rest)


def test_too_few_columns_teach():
    logits, rest = arguments(columns=10)
    with pytest.raises(ValueError, match=r"10 columns on 1 ranks do not cover vocab_size=11"):
        vocab_parallel_nelbo(logits, *rest)
