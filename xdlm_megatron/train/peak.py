"""Peak floating-point rate of one process's device, the denominator of MFU."""

from __future__ import annotations

import time

import torch

from xdlm_megatron.launch.gpus import GPUS


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s and where the figure is from: the data sheet, or the fastest of a few matrix products here."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for gpu in GPUS.values():  # float32 training is not what MFU is asked for
            if gpu.model in name:
                return gpu.bf16_flops, f"{gpu.model} data sheet"
    return _measured(device, dtype), "fastest matrix product measured at the start"


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
