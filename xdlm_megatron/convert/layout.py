"""Conversions run as one process in PyTorch, whatever the recipe trains under: checkpoints load under any."""

from __future__ import annotations

import dataclasses
import os

from xdlm_megatron.config.identity import FREE_FIELDS
from xdlm_megatron.config.schema import Parallel, Precision, RunConfig
from xdlm_megatron.convert.hf_config import ConvertError


def on_one_process(config: RunConfig) -> RunConfig:
    """The recipe without its layout, Transformer Engine, FP8 and what of Megatron's fields goes with them.

    Raises ConvertError where torchrun has started several processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ConvertError(
            f"convert is one process and not {world_size}; start it by python -m xdlm_megatron"
        )
    fields = {
        name: value for name, value in config.model.mcore.items() if f"model.mcore.{name}" not in FREE_FIELDS
    }
    return dataclasses.replace(
        config,
        parallel=Parallel(),
        model=dataclasses.replace(config.model, transformer_impl="local", mcore=fields),
        precision=Precision(dtype=config.precision.dtype),
    )
