"""What a checkpoint holds: one nested dict of sharded tensors and plain values, saved and loaded."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from xdlm_megatron.parallel.fp8_scales import scales_trusted

# The optimizer's state in the model's shapes: any layout loads it.
FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def model_state(chunks: list[Any], groups: ProcessGroupCollection) -> dict[str, Any]:
    """Sharded tensors of the model: {"model0": ..., "model1": ...}, one entry a pipeline chunk.

    chunks: the bare DiffusionLM modules.
    """
    metadata = {**FORMAT, "dp_cp_group": groups.dp_cp}
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }


def load_model_state(chunks: list[Any], values: dict[str, Any]) -> None:
    """Puts what a checkpoint held of model_state's into the bare modules, the scales of FP8 among it."""
    with scales_trusted():
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(values[f"model{index}"])


def optimizer_state(
    model: dict[str, Any],
    optimizer: MegatronOptimizer,
    lr_schedule: OptimizerParamScheduler,
    groups: ProcessGroupCollection,
    is_loading: bool,
) -> dict[str, Any]:
    """Sharded tensors of the optimizer, and the schedule's counters."""
    metadata = {**FORMAT, "dp_cp_group": groups.dp_cp}
    # The optimizer wants the state of a single chunk bare, of several by name.
    shaped = model if len(model) > 1 else model["model0"]
    return {
        "optimizer": optimizer.sharded_state_dict(shaped, is_loading=is_loading, metadata=metadata),
        "lr_schedule": lr_schedule.state_dict(),
    }
