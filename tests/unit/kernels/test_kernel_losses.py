"""The losses of diffusion/ with the kernels behind them against the same losses on PyTorch row operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xdlm_megatron.diffusion.head_nelbo import head_nelbo
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo
from xdlm_megatron.kernels.library import Library
from xdlm_megatron.kernels.nelbo import nelbo_row_ops

B, S, V, P, MASK = 2, 3, 101, 104, 7
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def refuse(*arguments: object) -> None:
    raise AssertionError("called where it has no work")


@pytest.fixture(scope="module", params=["split", "whole"])
def ops(request: pytest.FixtureRequest, library: Library) -> RowOps:
    """Both forms; the split one is what several ranks use."""
    kernels = nelbo_row_ops(library)
    if request.param == "split":
        return kernels._replace(whole=None, rescale=None)
    return kernels._replace(stats=refuse, merge=refuse, sums=refuse, finish=refuse)


def make_case(k: float, dtype: torch.dtype, device: str) -> tuple[Tensor, tuple, dict[str, Tensor]]:
    """Logits stored as [S, B, P], the loss's arguments, upstream gradients; one token without weight."""
    generator = torch.Generator().manual_seed(0)
    noise = StationaryNoise(k, V, MASK)
    logits_SBP = 3 * torch.randn(S, B, P, generator=generator)
    logits_SBP[2, 1] = torch.nan
    x0 = torch.randint(8, V, (B, S), generator=generator)
    zt = torch.tensor([[MASK, 9, MASK], [MASK, MASK, 3]])
    zt[0, 1] = x0[0, 1]
    alpha = torch.rand(B, S, dtype=torch.float64, generator=generator) * 0.9 + 0.05
    dalpha = torch.full_like(alpha, -0.999)
    dalpha[1, 2] = 0.0
    mixed = torch.rand(B, S, generator=generator) - 0.3
    mixed[0, 0] = 0.0
    upstream = {"ones": torch.ones(B, S), "mixed": mixed}
    rest = (x.to(device) for x in (zt, x0, alpha, 1 - alpha, dalpha))
    moved = {name: x.to(device) for name, x in upstream.items()}
    return logits_SBP.to(device, dtype), (*rest, noise), moved


@pytest.mark.parametrize("upstream", ["ones", "mixed"])
@pytest.mark.parametrize("grad_in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0.0, 0.1])
def test_loss_of_logits(k, dtype, grad_in_place, upstream, ops, library) -> None:
    logits, rest, upstreams = make_case(k, dtype, library.device_type)
    results = []
    for implementation in (REFERENCE, ops):
        leaf = logits.clone().requires_grad_()
        stored = leaf * 1
        loss = vocab_parallel_nelbo(
            stored.transpose(0, 1), *rest, grad_in_place=grad_in_place, ops=implementation
        )
        loss.backward(upstreams[upstream])
        results.append((loss.detach(), leaf.grad))
        assert torch.equal(stored.detach(), leaf.grad) == grad_in_place
    (want, want_grad), (got, grad) = results
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)
    size = want_grad.float().abs().amax(-1, keepdim=True)
    assert ((grad.float() - want_grad.float()).abs() <= DTYPES[dtype] * size).all()
    assert got[1, 2] == 0


def test_a_gradient_that_took_the_logits_place_comes_once(ops, library) -> None:
    logits, rest, _ = make_case(0.1, torch.float32, library.device_type)
    stored = logits.requires_grad_() * 1
    loss = vocab_parallel_nelbo(stored.transpose(0, 1), *rest, grad_in_place=True, ops=ops).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_the_logits_stay(ops, library) -> None:
    logits, rest, _ = make_case(0.1, torch.float32, library.device_type)
    kept = logits.clone()
    with torch.no_grad():
        vocab_parallel_nelbo(logits.transpose(0, 1), *rest, grad_in_place=True, ops=ops)
    assert torch.equal(logits.nan_to_num(), kept.nan_to_num())


def test_mask_noise_needs_no_second_pass(library) -> None:
    logits, rest, _ = make_case(0.0, torch.float32, library.device_type)
    ops = nelbo_row_ops(library)._replace(whole=None, rescale=None, sums=refuse)
    vocab_parallel_nelbo(logits.requires_grad_().transpose(0, 1), *rest, ops=ops).sum().backward()


def test_rows_too_long_for_a_cluster_go_in_passes(library) -> None:
    """600,000 bytes are more than eight blocks hold."""
    noise = StationaryNoise(0.1, 150_001, 150_000)
    logits = torch.randn(1, 2, 150_001, generator=torch.Generator().manual_seed(0)).to(library.device_type)
    ids = torch.tensor([[150_000, 5]], device=library.device_type)
    half = torch.full((1,), 0.5, device=library.device_type)
    results = []
    for ops in (REFERENCE, nelbo_row_ops(library)):
        leaf = logits.clone().requires_grad_()
        stored = leaf * 1
        rest = (ids, ids.clamp_max(9), half, half, -half, noise)
        loss = vocab_parallel_nelbo(stored, *rest, grad_in_place=True, ops=ops)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("upstream", ["ones", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0.0, 0.1])
def test_fused_head(k, dtype, upstream, ops, library) -> None:
    _, rest, upstreams = make_case(k, dtype, library.device_type)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, S, 16, generator=generator).to(library.device_type, dtype)
    weight = torch.randn(P, 16, generator=generator).to(library.device_type, dtype)
    hidden[1, 2] = torch.nan
    results = []
    for implementation in (REFERENCE, ops):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = head_nelbo(*leaves, *rest, chunk_tokens=4, ops=implementation)
        loss.backward(upstreams[upstream])
        results.append((loss.detach(), *(leaf.grad.float() for leaf in leaves)))
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= DTYPES[dtype] * want.norm()
