"""What the benchmarks measure with: the seconds, the peak memory and the bytes of a step on a device."""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """By CUDA events on a GPU; on a CPU the CPU time of this process, all its threads: what else the machine
    does hardly changes it.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.process_time()
    work()
    return time.process_time() - begin


def best_seconds(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The least of some runs."""
    return min(seconds_of(work, device) for _ in range(repeats))


def baseline_mib(device: torch.device) -> float:
    """What is held now (resident on a CPU, allocated on CUDA); from here on peak_mib counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # free pages go back: what is used again counts again
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    return peak_mib(device)


def peak_mib(device: torch.device) -> float:
    """The most that was held at once since baseline_mib."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


class CountBytes(TorchDispatchMode):
    """Adds up what operators read and write; views cost nothing. It sees PyTorch's operators alone."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not any(
            result.alias_info and not result.alias_info.is_write for result in function._schema.returns
        ):
            tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            self.total += sum(x.numel() * x.element_size() for x in tensors.values())
        return out
