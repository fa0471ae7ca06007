"""Run as a script: the peak memory, in MiB, that a loss and its gradient add to their inputs.

    python compiled_step.py TOKENS V

`compiled` is vocab_parallel_nelbo within a region compiled by Inductor; `plain`, to show that the measure
sees float32 copies of the logits, the loss of nelbo.py under autograd.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from xdlm_megatron.diffusion.nelbo import nelbo_density
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo


def vm_hwm_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def added_mib(step: Callable[[], Tensor], logits: Tensor) -> float:
    """By one step and its backward, the gradient of the logits included; it is there afterwards."""
    logits.grad = None
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = vm_hwm_mib()
    step().backward()
    return vm_hwm_mib() - before


def main(tokens: int, V: int) -> None:
    torch.manual_seed(0)
    noise = StationaryNoise(0.1, V, V - 1)
    logits = torch.empty(1, tokens, V, dtype=torch.bfloat16).normal_().requires_grad_()
    x0 = torch.randint(0, V - 1, (1, tokens))
    zt = torch.where(torch.arange(tokens) % 2 == 0, V - 1, x0)
    half = torch.full((1,), 0.5)
    rest = (zt, x0, half, half, -half, noise)

    def step() -> Tensor:
        return 2 * vocab_parallel_nelbo(logits, *rest).sum()

    compiled = torch.compile(step, backend="inductor", dynamic=False)
    compiled().backward()
    report = {"compiled": added_mib(compiled, logits)}
    ours, logits.grad = logits.grad, None
    step().backward()
    report["same_gradient"] = torch.equal(logits.grad, ours)
    report["plain"] = added_mib(lambda: nelbo_density(logits, *rest).sum(), logits)
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
