"""GPU types: what their data sheets say. Rates are dense, one direction, for one GPU, in units a second."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """memory: bytes that a process finds. link: to GPUs of its node; network: to those of other nodes.

    fp8_flops: None where it has no FP8.
    """

    name: str
    memory: float
    bf16_flops: float
    fp32_flops: float
    memory_bandwidth: float
    link: float
    network: float
    per_node: int
    source: str
    fp8_flops: float | None = None

    @property
    def model(self) -> str:
        """As it stands in the name that the driver gives."""
        return self.name.partition("-")[0].upper()

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products of the recipe's `precision.dtype`."""
        return self.bf16_flops if dtype == "bfloat16" else self.fp32_flops


# memory: the data sheet's less what the driver keeps, as torch reports it. network: an adapter for each GPU,
# as in NVIDIA's DGX systems: 200 Gbit/s with an A100, 400 with an H100.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "a100-40",
            39.4 * GIB,
            312e12,
            19.5e12,
            1.555e12,
            300e9,
            25e9,
            8,
            "NVIDIA A100 data sheet, SXM 40 GB",
        ),
        Gpu(
            "a100", 79.1 * GIB, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 8, "NVIDIA A100 data sheet, SXM 80 GB"
        ),
        Gpu(
            "h100", 79.1 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9, 8, "NVIDIA H100 data sheet, SXM", 1979e12
        ),
        Gpu(
            "h200", 139.8 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9, 8, "NVIDIA H200 data sheet, SXM", 1979e12
        ),
        Gpu(
            "b200",
            178.4 * GIB,
            2250e12,
            75e12,
            8e12,
            900e9,
            50e9,
            8,
            "NVIDIA DGX B200 data sheet, an eighth",
            4500e12,
        ),
        Gpu(
            "l40s",
            44.4 * GIB,
            362e12,
            91.6e12,
            0.864e12,
            32e9,
            25e9,
            8,
            "NVIDIA L40S data sheet, PCIe 4.0 x16",
            733e12,
        ),
    )
}
