"""A plan as text: the recipe's own layout by part, then the layouts that fit, then what was assumed."""

from __future__ import annotations

from dataclasses import fields, replace

from xdlm_megatron.launch.cost import ASSUMPTIONS, Step
from xdlm_megatron.launch.gpus import GIB
from xdlm_megatron.launch.layout import RECOMPUTES, FuseHead, Layout
from xdlm_megatron.launch.memory import RESERVE, Memory, head_bytes, host_bytes, stage_memory
from xdlm_megatron.launch.plan import Candidate, Plan
from xdlm_megatron.tracking.console import with_unit

_COLUMNS = (
    "tp",
    "pp",
    "vpp",
    "cp",
    "dp",
    "micro",
    "recompute",
    "GiB",
    "spare",
    "s/step",
    "MFU",
    "bubble",
    "days",
)
_FORMAT = "  {:>3} {:>3} {:>3} {:>3} {:>5} {:>5} {:>9} {:>6} {:>6} {:>8} {:>6} {:>6} {:>8}"


def as_text(plan: Plan, name: str) -> str:
    """What `plan` prints."""
    lines = _head(plan, name)
    if isinstance(plan.recipe, str):
        lines += ["", f"the recipe's own layout does not fit these GPUs: {plan.recipe}"]
    else:
        lines += ["", *_own_layout(plan, plan.recipe)]
    lines += [f"  note: {note}" for note in plan.notes]
    lines += ["", *_search(plan)]
    lines += ["", "assumed:", *(f"  - {line}" for line in (*ASSUMPTIONS, _reserve()))]
    return "\n".join(lines)


def _reserve() -> str:
    return (
        f"{RESERVE / GIB:.0f} GiB of a GPU for CUDA, NCCL, workspaces and fragmentation; memory is that of "
        "the first or the last pipeline stage, whichever needs more"
    )


def _head(plan: Plan, name: str) -> list[str]:
    shape, gpu = plan.shape, plan.gpu
    rate = gpu.flops(shape.dtype) / 1e12
    tokens = shape.total_tokens
    return [
        f"{name} on {plan.world} x {gpu.name}: {gpu.memory / GIB:.1f} GiB, {rate:.0f} TFLOP/s in "
        f"{shape.dtype}, {gpu.per_node} a node ({gpu.source})",
        f"  {with_unit(shape.num_parameters)} parameters, {with_unit(shape.flops_per_token)} FLOP a token "
        f"with full attention ({shape.flops_per_token / (6 * shape.num_parameters):.2f} x 6N); "
        f"{with_unit(shape.tokens_per_step)} tokens a step, {with_unit(tokens)} in all, "
        f"{tokens * shape.flops_per_token:.3g} FLOPs",
    ]


def _own_layout(plan: Plan, own: Candidate) -> list[str]:
    layout, memory = own.layout, own.memory
    sequence = " with sequence parallelism" if layout.sequence_parallel else ""
    lines = [
        f"the recipe's layout: tensor {layout.tp}{sequence}, pipeline {layout.pp} (virtual {layout.vpp}), "
        f"context {layout.cp}, data {layout.dp}; {layout.microbatches(plan.shape)} micro-batches of "
        f"{layout.micro_batch}",
        "  memory of one GPU, GiB",
    ]
    for field in fields(Memory):
        value = getattr(memory, field.name) / GIB
        lines.append(
            f"    {field.name.replace('_', ' '):14} {value:8.2f}{_choices(plan, layout, field.name)}"
        )
    state = (
        f"{own.spare / GIB:.2f} to spare" if own.fits else f"DOES NOT FIT: {-own.spare / GIB:.2f} GiB missing"
    )
    lines.append(f"    {'total':14} {memory.total / GIB:8.2f}   {state}")
    if plan.shape.offloaded:
        host = host_bytes(plan.shape, layout) / GIB
        lines.append(
            f"  memory of the CPU for it: {host:.2f} GiB, {plan.shape.offloaded:.0%} of the optimizer"
        )
    return lines + _step_lines(own.step)


def _choices(plan: Plan, layout: Layout, part: str) -> str:
    """What the same part would be with other recomputation, or with the head and the loss fused or apart."""
    if part == "activations":
        values = {r: stage_memory(plan.shape, replace(layout, recompute=r)).activations for r in RECOMPUTES}
        shown = ", ".join(f"{name} {value / GIB:.2f}" for name, value in values.items())
        return f"   recompute {layout.recompute}; by choice: {shown}"
    if part == "head_and_loss":
        choices: tuple[FuseHead, ...] = ("always", "never")
        fused, apart = (head_bytes(plan.shape, replace(layout, fuse_head=c)) / GIB for c in choices)
        where = "" if layout.pp == 1 else ", on the last stage"
        return f"   fuse_head {layout.fuse_head}; fused {fused:.2f}, apart {apart:.2f}{where}"
    return ""


def _step_lines(step: Step) -> list[str]:
    seconds = step.seconds
    parts = ", ".join(
        f"{field.name} {getattr(seconds, field.name) / seconds.total:.0%}"
        for field in fields(seconds)
        if getattr(seconds, field.name) > 0.005 * seconds.total
    )
    traffic = ", ".join(
        f"{field.name} {with_unit(getattr(step.traffic, field.name))}B"
        for field in fields(step.traffic)
        if getattr(step.traffic, field.name) > 0
    )
    return [
        f"  a step: {seconds.total:.3g} s ({parts})",
        f"  sent by a GPU in a step: {traffic or 'nothing'}",
        f"  predicted: MFU {step.mfu:.1%}, {with_unit(step.tokens_per_second)} tokens/s, "
        f"{step.days:.3g} days",
    ]


def _search(plan: Plan) -> list[str]:
    if not plan.num_tried:
        return [
            f"no layout divides: {plan.world} GPUs against {plan.shape.num_layers} layers, "
            f"{plan.shape.heads} heads, {plan.shape.groups} key/value heads and "
            f"train.global_batch_size={plan.shape.global_batch}; change the number of GPUs or the batch"
        ]
    if plan.ranked:
        title = f"layouts that fit, fastest first (the best of each split, {plan.num_tried} tried)"
    else:
        title = f"NOTHING FITS of {plan.num_tried} layouts; the nearest, by what is missing"
    lines = [title, _FORMAT.format(*_COLUMNS)]
    lines += [_row(candidate) for candidate in plan.ranked or plan.nearest]
    best = (plan.ranked or plan.nearest)[0]
    use = "use the first with" if plan.ranked else "the first is"
    lines += [f"{use}:", "  " + " ".join(best.layout.overrides())]
    if not plan.ranked:
        parts = {f.name: getattr(best.memory, f.name) / GIB for f in fields(Memory)}
        largest = max(parts, key=lambda name: parts[name])
        lines.append(
            f"  it needs {best.memory.total / GIB:.1f} GiB, {-best.spare / GIB:.1f} more than there are, the "
            f"most for {largest.replace('_', ' ')} ({parts[largest]:.1f}); take more GPUs, or a smaller "
            "model or sequence"
        )
    return lines


def _row(found: Candidate) -> str:
    layout, step = found.layout, found.step
    return _FORMAT.format(
        f"{layout.tp}{'s' if layout.sequence_parallel else ''}",
        layout.pp,
        layout.vpp,
        layout.cp,
        layout.dp,
        layout.micro_batch,
        layout.recompute,
        f"{found.memory.total / GIB:.1f}",
        f"{found.spare / GIB:.1f}",
        f"{step.seconds.total:.3g}",
        f"{step.mfu:.1%}",
        f"{step.bubble_share:.1%}",
        f"{step.days:.3g}",
    )
