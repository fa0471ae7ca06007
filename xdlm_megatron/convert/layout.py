"""Conversions run as one process, whatever layout the recipe trains under: checkpoints load under any."""

from __future__ import annotations

import dataclasses
import os

from xdlm_megatron.config.schema import Parallel, RunConfig
from xdlm_megatron.convert.hf_config import ConvertError


def on_one_process(config: RunConfig) -> RunConfig:
    """The recipe without its layout. Raises ConvertError where torchrun has started several processes."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ConvertError(
            f"convert is one process and not {world_size}; start it by python -m xdlm_megatron"
        )
    return dataclasses.replace(config, parallel=Parallel())
