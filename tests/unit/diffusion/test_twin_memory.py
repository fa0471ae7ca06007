"""The PyTorch twin holds no float32 tensor of the logits' size, run as it is or behind torch.compile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def largest_float32(loss, k: float) -> int:
    """Elements, over forward and backward."""
    generator = torch.Generator().manual_seed(0)
    noise = StationaryNoise(k, V, V - 1)
    logits = torch.randn(1, TOKENS, V, generator=generator).bfloat16().requires_grad_()
    x0 = torch.randint(0, V - 1, (1, TOKENS), generator=generator)
    zt = torch.where(torch.arange(TOKENS) % 2 == 0, V - 1, x0)
    half = torch.full((1,), 0.5)
    with LargestFloat32() as seen:
        loss(logits, zt, x0, half, half, -half, noise).sum().backward()
    assert logits.grad is not None
    return seen.elements


@pytest.mark.parametrize("k", [0.0, 0.1])
def test_no_float32_copy_of_the_logits(k, monkeypatch) -> None:
    rows = 16
    monkeypatch.setitem(row_ops.SCRATCH_ELEMENTS, "cpu", rows * V)
    largest = largest_float32(vocab_parallel_nelbo, k)
    assert largest <= 2 * rows * V, "the two scratch buffers are the largest"
    assert largest >= rows * V, "the check must have seen the passes"


def test_the_check_sees_one_where_it_is() -> None:
    assert largest_float32(nelbo_density, 0.1) >= TOKENS * V


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler"
)
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory")
def test_none_within_a_region_that_inductor_compiles() -> None:
    tokens, vocab = 64, 131072
    script = Path(__file__).with_name("compiled_step.py")
    command = [sys.executable, str(script), str(tokens), str(vocab)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    copy_mib = tokens * vocab * 4 / 2**20
    gradient_mib = copy_mib / 2
    assert found["same_gradient"], "the region computes what the plain call does"
    assert found["plain"] >= gradient_mib + copy_mib, "the measure must see a copy where there is one"
    assert gradient_mib <= found["compiled"] < gradient_mib + copy_mib / 2
