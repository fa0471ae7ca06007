"""Peak floating-point rate of one process's device, the denominator of MFU."""

from __future__ import annotations

import time

import torch

# Dense bf16 FLOP/s from NVIDIA's data sheets; float32 training on them is not what MFU is asked for.
_DATA_SHEET = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s and where the figure is from: the data sheet, or the fastest of a few matrix products here."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for model, flops in _DATA_SHEET.items():
            if model in name:
                return flops, f"{model} data sheet"
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
