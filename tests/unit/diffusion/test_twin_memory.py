"""The PyTorch twin holds no float32 tensor of the logits' size, run as it is or behind torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xdlm_megatron.diffusion import row_ops
from xdlm_megatron.diffusion.nelbo import nelbo_density
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

TOKENS, V = 64, 1024


class LargestFloat32(TorchDispatchMode):
    """Remembers the most elements of a float32 storage that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // 4)
        return out


def largest_float32(loss, k: float, compiled: bool = False) -> int:
    """Elements, over forward and backward."""
    generator = torch.Generator().manual_seed(0)
    noise = StationaryNoise(k, V, V - 1)
    logits = torch.randn(1, TOKENS, V, generator=generator).bfloat16().requires_grad_()
    x0 = torch.randint(0, V - 1, (1, TOKENS), generator=generator)
    zt = torch.where(torch.arange(TOKENS) % 2 == 0, V - 1, x0)
    half = torch.full((1,), 0.5)
    seen, graphs = LargestFloat32(), []

    def backend(graph, inputs):  # inside the graph: under a dispatch mode nothing would be compiled
        graphs.append(graph)
        return lambda *arguments: [seen.__enter__(), graph(*arguments), seen.__exit__(None, None, None)][1]

    if compiled:
        value = torch.compile(loss, backend=backend)(logits, zt, x0, half, half, -half, noise).sum()
        assert len(graphs) == 1, "one graph, without a break"
    else:
        with seen:
            value = loss(logits, zt, x0, half, half, -half, noise).sum()
    with seen:
        value.backward()
    assert logits.grad is not None
    return seen.elements


@pytest.mark.parametrize("k", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_float32_copy_of_the_logits(compiled, k, monkeypatch) -> None:
    rows = 16
    monkeypatch.setitem(row_ops.SCRATCH_ELEMENTS, "cpu", rows * V)
    largest = largest_float32(vocab_parallel_nelbo, k, compiled)
    assert largest <= 2 * rows * V, "the two scratch buffers are the largest"
    assert largest >= rows * V, "the check must have seen the passes"


def test_the_check_sees_one_where_it_is() -> None:
    assert largest_float32(nelbo_density, 0.1) >= TOKENS * V
    assert largest_float32(nelbo_density, 0.1, compiled=True) >= TOKENS * V
