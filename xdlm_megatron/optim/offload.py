"""Part of the optimizer in the CPU's memory, updated by its cores: Megatron-Core's HybridDeviceOptimizer.

Its share of master weights and moments leaves the GPU; gradients go over each step and weights come back,
tensor by tensor while others are updated. The rest, if any, stays with the GPU's Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from xdlm_megatron.config.schema import Optimizer
from xdlm_megatron.parallel.gpu_packages import transformer_engine

# What HybridDeviceOptimizer writes into its parameter groups beside Adam's knobs: they would be in every
# checkpoint, classes of Transformer Engine among them.
_NOT_ADAMS = (
    "offload_fraction",
    "cpu_optimizer_cls",
    "gpu_optimizer_cls",
    "param_update_in_fp32",
    "pin_cpu_grads",
    "pin_cpu_params",
    "overlap_cpu_optimizer_d2h_h2d",
)


def offload_fields(section: Optimizer) -> dict[str, Any]:
    """Fields of OptimizerConfig; none without `optimizer_cpu_offload`.

    Without `use_precision_aware_optimizer` megatron-core 0.16.1 keeps the master weights on the GPU as well,
    and cannot load a checkpoint.

    Raises:
        ValueError: this process has no Transformer Engine, whose version megatron-core asks for.
    """
    if not section.optimizer_cpu_offload:
        return {}
    engine = transformer_engine()
    if not engine.parts:
        raise ValueError(
            f"optimizer.optimizer_cpu_offload=true needs Transformer Engine on a GPU ({engine}); set it to "
            "false, or install it (docs/gpu.md)"
        )
    return dict(
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=section.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=True,
        use_precision_aware_optimizer=True,
    )


def inner_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """One for each kind of parameter."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def master_weight(inner: DistributedOptimizer, group: int, order: int) -> Tensor:
    """The float32 shard that is updated, on the CPU where it is offloaded. A load may make it anew."""
    weight = inner.optimizer.param_groups[group]["params"][order]
    if isinstance(inner.optimizer, HybridDeviceOptimizer):
        return inner.optimizer.param_to_inner_param[weight]
    return weight


def make_resumable(optimizer: MegatronOptimizer) -> None:
    """Lets checkpoints of offloaded optimizers and of those on the GPU alone load into each other."""
    for inner in inner_optimizers(optimizer):
        hybrid = inner.optimizer
        if isinstance(hybrid, HybridDeviceOptimizer):
            for group in hybrid.param_groups:
                for name in _NOT_ADAMS:
                    del group[name]
            hybrid.register_load_state_dict_pre_hook(_use_fused_adam)
            hybrid.register_load_state_dict_post_hook(_count_steps_once)


@torch.no_grad()
def begin_moments(optimizer: MegatronOptimizer) -> None:
    """Gives parameters that were never updated the moments and the count that they begin with, zeros.

    Without them a run whose updates were all skipped so far cannot be saved.
    """
    for inner in inner_optimizers(optimizer):
        whole = inner.optimizer
        if whole.state:
            continue
        is_hybrid = isinstance(whole, HybridDeviceOptimizer)
        for adam in whole.sub_optimizers if is_hybrid else [whole]:
            for group in adam.param_groups:
                for p in group["params"]:
                    adam.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                    if isinstance(adam, torch.optim.Adam):  # counts by parameter, the others by group
                        adam.state[p]["step"] = torch.zeros((), device=p.device)
                    else:
                        group["step"] = 0
        if is_hybrid:
            whole._sync_sub_optimizers_state_to_hdo()


def _use_fused_adam(_: HybridDeviceOptimizer, state: dict[str, Any]) -> None:
    """A checkpoint of the GPU's Adam does not know torch's knob."""
    for group in state["param_groups"]:
        group["fused"] = True


def _count_steps_once(hybrid: HybridDeviceOptimizer) -> None:
    """The step of the checkpoint is now in the parts' own groups and states, which count on from it.

    Left in these groups it would be copied over the GPU's count before every update.
    """
    for group in hybrid.param_groups:
        group.pop("step", None)
