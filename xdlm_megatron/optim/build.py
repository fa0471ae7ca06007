"""Recipe -> Megatron's optimizer and its learning-rate schedule."""

from __future__ import annotations

from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from xdlm_megatron.config.schema import ConstantLr, LrSchedule, Optimizer, WsdLr
from xdlm_megatron.optim.offload import make_resumable, offload_fields
from xdlm_megatron.parallel.mesh import Mesh


def build_optimizer(
    section: Optimizer, schedule: LrSchedule, chunks: list[MegatronModule], mesh: Mesh
) -> MegatronOptimizer:
    """AdamW over the wrapped model chunks, float32 master weights, sharded over data parallel if asked.

    Raises:
        ValueError: it is to be offloaded, and this process cannot.
    """
    transformer = chunks[0].config
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=_min_lr(schedule, section),
        weight_decay=section.weight_decay,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_eps=section.adam_eps,
        clip_grad=section.clip_grad,
        bf16=transformer.bf16,
        params_dtype=transformer.params_dtype,
        fp8_recipe=transformer.fp8_recipe if transformer.fp8 else None,
        use_distributed_optimizer=section.use_distributed_optimizer,
        **offload_fields(section),
    )
    optimizer = get_megatron_optimizer(
        config,
        chunks,
        config_overrides=get_standard_config_overrides(config),  # norms: weight decay times 0
        use_gloo_process_groups=False,
        pg_collection=mesh.groups,
    )
    make_resumable(optimizer)
    return optimizer


def restore_fp8_weights(optimizer: MegatronOptimizer, chunks: list[MegatronModule]) -> None:
    """Makes weights that are kept in FP8 of the loaded float32 ones, as the update before did.

    A checkpoint has them in bfloat16, and so they were rounded once more when they were loaded.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part._copy_main_params_to_model_params()
    for chunk in chunks:
        if not chunk.ddp_config.overlap_param_gather:  # else the next forward gathers
            chunk.start_param_sync()


def build_lr_schedule(
    schedule: LrSchedule, section: Optimizer, num_steps: int, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """Megatron's scheduler, counted in optimizer steps.

    Update n, counted from 0, takes the rate of step n: with a warm-up the first update's rate is 0, and the
    last one stops a step short of the schedule's end. It also exempts the norms from weight decay, by the
    multipliers that `build_optimizer` gave their groups.
    """
    is_wsd = isinstance(schedule, WsdLr)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=_min_lr(schedule, section),
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style="WSD" if is_wsd else schedule.kind,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.decay_steps if is_wsd else None,
        lr_wsd_decay_style=schedule.decay_style if is_wsd else None,
    )


def _min_lr(schedule: LrSchedule, section: Optimizer) -> float:
    return section.lr if isinstance(schedule, ConstantLr) else schedule.min_lr
