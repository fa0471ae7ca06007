"""The head fused with the loss against the loss of the logits written out."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xdlm_megatron.diffusion import head_nelbo as head_nelbo_module
from xdlm_megatron.diffusion import row_ops
from xdlm_megatron.diffusion.head_nelbo import head_nelbo
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

# batch, sequence, hidden, vocabulary, padded vocabulary, mask id
SHAPES = [(3, 41, 24, 1003, 1024, 1002), (2, 5, 7, 64, 64, 0), (1, 7, 5, 9, 16, 4)]
RATIOS = [0.0, 1e-3, 0.1, 1.0]


def make_case(shape, k, dtype=torch.float64, transposed=False):
    """Leaves (hidden, weight), the loss's other arguments, and an upstream gradient that differs by token."""
    B, S, H, V, P, mask_id = shape
    generator = torch.Generator().manual_seed(0)
    noise = StationaryNoise(k, V, mask_id)
    hidden = torch.randn((S, B, H) if transposed else (B, S, H), dtype=torch.float64, generator=generator)
    weight = torch.randn(P, H, dtype=torch.float64, generator=generator) / H**0.5
    x0 = torch.randint(0, V - 1, (B, S), generator=generator)
    x0 = x0 + (x0 >= mask_id)
    alpha = torch.linspace(0.02, 0.98, B, dtype=torch.float64)
    zt = noise.corrupt(x0, torch.full((B,), 0.5), (1, 1), (torch.arange(B)[:, None], torch.arange(S)))
    upstream = torch.rand(B, S, dtype=torch.float64, generator=generator) - 0.3
    upstream[0, 0] = 0
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    return leaves, (zt, x0, alpha, 1 - alpha, torch.full_like(alpha, -0.999), noise), upstream


def view(hidden, transposed):
    return hidden.transpose(0, 1) if transposed else hidden


def unfused(leaves, rest, upstream, transposed=False):
    """Loss and gradients from the logits written out, in float64."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in leaves)
    logits = torch.matmul(hidden, weight.t())
    loss = vocab_parallel_nelbo(view(logits, transposed), *rest)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000, None])
@pytest.mark.parametrize("k", RATIOS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_loss_of_the_logits_in_float64(transposed, shape, k, chunk_tokens) -> None:
    leaves, rest, upstream = make_case(shape, k, transposed=transposed)
    for factor in (upstream, torch.full_like(upstream, 0.7), torch.zeros_like(upstream)):
        want, *want_grads = unfused(leaves, rest, factor, transposed)
        got = head_nelbo(view(leaves[0], transposed), leaves[1], *rest, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(got.detach(), want, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(torch.autograd.grad(got, leaves, factor), want_grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * theirs.abs().max().item())


@pytest.mark.parametrize("same_upstream", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("k", RATIOS)
def test_working_precisions(k, dtype, tolerance, same_upstream) -> None:
    leaves, rest, upstream = make_case(SHAPES[0], k, dtype, transposed=True)
    if same_upstream:
        upstream = torch.full_like(upstream, 3.0)
    want, *want_grads = unfused(leaves, rest, upstream, transposed=True)
    got = head_nelbo(view(leaves[0], True), leaves[1], *rest, chunk_tokens=17)
    assert got.dtype == torch.float32
    assert (got - want).norm() <= tolerance * want.norm()
    grads = torch.autograd.grad(got, leaves, upstream.float())
    for mine, theirs, leaf in zip(grads, want_grads, leaves, strict=True):
        assert mine.dtype == dtype
        assert mine.stride() == leaf.stride()
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("k", RATIOS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_and_padding_rows_get_no_gradient(shape, k) -> None:
    leaves, rest, upstream = make_case(shape, k, torch.float32)
    with torch.no_grad():
        leaves[1][shape[3] :] = 50.0
        leaves[1][shape[5]] = 50.0
    for factor in (upstream.float(), torch.ones(upstream.shape)):
        got = head_nelbo(leaves[0], leaves[1], *rest, chunk_tokens=4)
        _, grad = torch.autograd.grad(got, leaves, factor)
        assert (grad[shape[3] :] == 0).all()
        assert (grad[shape[5]] == 0).all()
        assert grad.abs().max() > 0


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_without_the_other(wanted) -> None:
    leaves, rest, upstream = make_case(SHAPES[0], 0.1)
    want = unfused(leaves, rest, upstream)[1 + wanted]
    leaves[1 - wanted].requires_grad_(False)
    got = head_nelbo(*leaves, *rest, chunk_tokens=50)
    got.backward(upstream)
    torch.testing.assert_close(leaves[wanted].grad, want, rtol=1e-10, atol=1e-10)
    assert leaves[1 - wanted].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0.0, 0.1])
def test_the_weight_s_gradient_is_added_to_the_caller_s_sum(k, dtype, monkeypatch) -> None:
    monkeypatch.setattr(head_nelbo_module, "TILE_ELEMENTS", 100 * 24)  # 1024 rows in 11 tiles
    leaves, rest, upstream = make_case(SHAPES[0], k, dtype)
    _, want_hidden, want_weight = unfused(leaves, rest, torch.ones_like(upstream))
    main_grad = torch.full(leaves[1].shape, 0.25)
    loss = head_nelbo(*leaves, *rest, chunk_tokens=50, main_grad_PH=main_grad)
    loss.sum().backward(retain_graph=True)
    assert leaves[1].grad is None
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert (main_grad - 0.25 - want_weight).norm() <= tolerance * want_weight.norm()
    assert (leaves[0].grad - want_hidden).norm() <= tolerance * want_hidden.norm()
    loss.sum().backward()
    assert (main_grad - 0.25 - 2 * want_weight).norm() <= 2 * tolerance * want_weight.norm()


@pytest.mark.parametrize("factor", [1 / 8192, 0.0, torch.nan])
@pytest.mark.parametrize("where", [slice(None), 3])
def test_the_caller_s_sum_takes_no_upstream_gradient_but_one(where, factor) -> None:
    leaves, rest, upstream = make_case(SHAPES[0], 0.1, torch.float32)
    upstream = torch.ones(upstream.shape)
    upstream.view(-1)[where] = factor
    loss = head_nelbo(*leaves, *rest, main_grad_PH=torch.zeros(leaves[1].shape))
    message = f"upstream gradient of {factor:.6g} and can take 1 alone.*scale main_grad afterwards"
    with pytest.raises(ValueError, match=message):
        loss.backward(upstream)


def test_a_frozen_weight_with_a_sum_takes_any_upstream_gradient() -> None:
    leaves, rest, upstream = make_case(SHAPES[0], 0.1)
    want = unfused(leaves, rest, upstream)[1]
    leaves[1].requires_grad_(False)
    main_grad = torch.zeros(leaves[1].shape)
    head_nelbo(*leaves, *rest, main_grad_PH=main_grad).backward(upstream)
    torch.testing.assert_close(leaves[0].grad, want, rtol=1e-10, atol=1e-10)
    assert not main_grad.any()


def test_without_gradients_the_caller_s_sum_stays() -> None:
    leaves, rest, _ = make_case(SHAPES[0], 0.1, torch.float32)
    main_grad = torch.zeros(leaves[1].shape)
    with torch.no_grad():
        head_nelbo(*leaves, *rest, main_grad_PH=main_grad)
    assert not main_grad.any()


def test_a_second_backward_gives_the_same_gradients() -> None:
    leaves, rest, upstream = make_case(SHAPES[0], 0.1)
    loss = head_nelbo(*leaves, *rest, chunk_tokens=50)
    ones = torch.ones_like(upstream)
    first, second = (torch.autograd.grad(loss, leaves, ones, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_token_without_upstream_gradient_may_hold_nan() -> None:
    leaves, rest, upstream = make_case(SHAPES[0], 0.1)
    with torch.no_grad():
        leaves[0][0, 0] = torch.nan
    upstream.fill_(1.0)[0, 0] = 0.0
    grad, _ = torch.autograd.grad(head_nelbo(*leaves, *rest, chunk_tokens=50), leaves, upstream)
    assert (grad[0, 0] == 0).all()
    assert grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of a tensor that an operator returned, and the products' rows. `known`
    tensors do not count.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.largest = 0
        self.multiplied_rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        if function is torch.ops.aten.mm.out:
            self.multiplied_rows += args[0].shape[0]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("same_upstream", [False, True])
@pytest.mark.parametrize("k", [0.0, 0.1])
def test_the_logits_of_all_tokens_never_exist(k, same_upstream, dtype, monkeypatch) -> None:
    monkeypatch.setitem(row_ops.SCRATCH_ELEMENTS, "cpu", 1 << 12)
    B, S, H, P, chunk = 4, 250, 8, 1024, 16
    leaves, rest, _ = make_case((B, S, H, 1003, P, 1002), k, dtype)
    upstream = torch.ones(B, S) if same_upstream else torch.rand(B, S)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with hooks, LargestTensor() as seen:
        head_nelbo(*leaves, *rest, chunk_tokens=chunk).backward(upstream)
    assert seen.largest == chunk * P, "a chunk's logits are the largest tensor"
    assert max(saved) == P * H
    tokens = (rest[0] == 1002).sum().item() if k == 0 else B * S
    assert seen.multiplied_rows == tokens * (1 if same_upstream else 2), "forward, and backward if it must"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_caller_s_sum_no_gradient_of_the_weight_exists(dtype, monkeypatch) -> None:
    monkeypatch.setitem(row_ops.SCRATCH_ELEMENTS, "cpu", 1 << 12)
    monkeypatch.setattr(head_nelbo_module, "TILE_ELEMENTS", 1 << 12)
    B, S, H, P, chunk = 2, 32, 64, 1024, 16
    leaves, rest, _ = make_case((B, S, H, 1003, P, 1002), 0.1, dtype)
    main_grad = torch.zeros(P, H)
    with LargestTensor(main_grad, leaves[1]) as seen:
        head_nelbo(*leaves, *rest, chunk_tokens=chunk, main_grad_PH=main_grad).sum().backward()
    assert main_grad.any()
    assert seen.largest == chunk * P, "a chunk's logits are the largest tensor, smaller than the weight"
    assert chunk * P < P * H


def test_a_shard_or_chunk_that_cannot_be_is_refused() -> None:
    leaves, rest, _ = make_case(SHAPES[0], 0.1)
    with pytest.raises(ValueError, match="do not cover vocab_size=1003"):
        head_nelbo(leaves[0], leaves[1][:512], *rest)
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        head_nelbo(*leaves, *rest, chunk_tokens=0)
    with pytest.raises(
        ValueError, match=r"main_grad_PH of shape \(1024, 24\) and torch.float64 must be float32"
    ):
        head_nelbo(*leaves, *rest, main_grad_PH=torch.zeros(1024, 24, dtype=torch.float64))
