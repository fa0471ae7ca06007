"""What fields of TransformerConfig ask of the whole process, and Megatron-Core leaves to its caller."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

# Read by cuBLAS, Transformer Engine and NCCL when they start: one order of every sum.
DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
}


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """deterministic_mode: the same bits from the same run on the same GPUs. Comes before CUDA's first use.

    An operation that has no deterministic form raises.

    Raises:
        ValueError: the environment asks for the contrary.
    """
    if not wanted:
        yield
        return
    for name, value in DETERMINISTIC_ENVIRONMENT.items():
        if name != "NCCL_ALGO" and os.environ.get(name, value) != value:
            raise ValueError(
                f"{name}={os.environ[name]} contradicts model.mcore.deterministic_mode=true, which needs "
                f"{value}; unset it, or turn that off"
            )
    missing = {name: value for name, value in DETERMINISTIC_ENVIRONMENT.items() if name not in os.environ}
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.update(missing)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        for name in missing:
            del os.environ[name]


@contextmanager
def tensor_parallel_overlap(
    transformer: TransformerConfig, seq_length: int, micro_batch_size: int
) -> Iterator[None]:
    """tp_comm_overlap: Transformer Engine's buffers, which all its layers send their slices through."""
    if not transformer.tp_comm_overlap:
        yield
        return
    from transformer_engine.pytorch.module import base

    modes = [base.UserBufferQuantizationMode.NONE]
    if transformer.fp8:
        modes = [base.UserBufferQuantizationMode.FP8, *(modes if transformer.first_last_layers_bf16 else ())]
    tokens = seq_length * micro_batch_size // transformer.context_parallel_size
    base.initialize_ub(
        shape=[tokens, transformer.hidden_size],
        tp_size=transformer.tensor_model_parallel_size,
        quantization_modes=modes,
        bootstrap_backend=transformer.tp_comm_bootstrap_backend,
    )
    try:
        yield
    finally:
        base.destroy_ub()
