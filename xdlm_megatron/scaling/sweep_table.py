"""A sweep as text: what would be run, and how far it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from xdlm_megatron.scaling.ladder import BATCH_RULES, LR_RULES, Rule
from xdlm_megatron.scaling.sweep import Point, SweepPlan
from xdlm_megatron.scaling.sweep_state import FINISHED, RunState
from xdlm_megatron.tracking.console import duration, with_unit


def plan_table(plan: SweepPlan) -> str:
    """What `--dry-run` prints."""
    sweep = plan.sweep
    header = ["run", "params", "non-emb", "tokens", "D/N", "steps", "batch", "lr", "FLOPs"]
    priced = sweep.gpu is not None
    header += ["GPUs", "tp.pp.cp", "hours", "GPU-h", "cost"] if priced else ["procs"]
    rows = [_plan_row(point, sweep.price, priced) for point in plan.points]
    tokens = sum(point.figures.total_tokens for point in plan.points)
    flops = sum(point.flops for point in plan.points)
    total = [f"{len(plan.points)} runs", "", "", with_unit(tokens), "", "", "", "", f"{flops:.3g}", ""]
    if priced:
        hours = sum(point.gpu_hours or 0 for point in plan.points)
        total += ["", "", f"{hours:,.1f}", f"{hours * sweep.price:,.0f}"]
    lines = [f"{plan.name}: run folders in {plan.folder}", *_table(header, [*rows, total])]
    lines += [f"batch: {_rule(BATCH_RULES, sweep.batch, 'tokens, D those of the run')}"]
    lines += [f"lr: {_rule(LR_RULES, sweep.lr, 'C and D those of the run, N without embedding and head')}"]
    if priced:
        lines += [f"hours: predicted for {sweep.gpu}, not measured (plan); a GPU-hour at {sweep.price:g}"]
    if plan.left_out:
        lines += [f"left out by sweep.steps and sweep.tokens_per_parameter: {'; '.join(plan.left_out)}"]
    return "\n".join(lines)


def _plan_row(point: Point, price: float, priced: bool) -> list[str]:
    figures, config = point.figures, point.config
    row = [
        point.name,
        with_unit(figures.num_parameters),
        with_unit(figures.num_non_embedding_parameters),
        with_unit(figures.total_tokens),
        f"{figures.total_tokens / figures.num_parameters:.3g}",
        f"{config.train.num_steps:,}",
        str(config.train.global_batch_size),
        f"{config.optimizer.lr:.3g}",
        f"{point.flops:.3g}",
        str(point.world),
    ]
    if not priced or point.seconds is None or point.gpu_hours is None:
        return row
    parallel = config.parallel
    layout = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    row += [".".join(map(str, layout)), f"{point.seconds / 3600:.3g}", f"{point.gpu_hours:,.1f}"]
    return [*row, f"{point.gpu_hours * price:,.0f}"]


def _rule(rules: Mapping[str, Rule], name: str, letters: str) -> str:
    if name == "fixed":
        return "the recipe's"
    rule = rules[name]
    return f"{rule.formula} ({letters}): {rule.source}"


def status_table(name: str, states: Sequence[RunState]) -> str:
    """What `--status` prints."""
    header = ["run", "state", "step", "of", "done", "loss", "tok/s", "left", "CPU s"]
    lines = [*_table(header, [_state_row(state) for state in states])]
    lines += [f"  {state.point.name}: {state.remark}" for state in states if state.remark]
    return "\n".join([*lines, summary(name, states)])


def _state_row(state: RunState) -> list[str]:
    steps, rate = state.point.config.train.num_steps, state.tokens_per_second
    left = ""
    if rate and state.state != FINISHED:
        left = duration((1 - state.share) * state.point.figures.total_tokens / rate)
    return [
        state.point.name,
        state.state,
        f"{state.step:,}",
        f"{steps:,}",
        f"{state.share:.0%}",
        "" if state.loss is None else f"{state.loss:.4f}",
        with_unit(rate) if rate else "",
        left,
        "" if state.cpu_seconds is None else f"{state.cpu_seconds:.1f}",
    ]


def summary(name: str, states: Sequence[RunState]) -> str:
    """One line: how many runs are where, and the share of the FLOPs that is done."""
    counts = Counter(state.state for state in states)
    spent = sum(state.share * state.point.flops for state in states)
    total = sum(state.point.flops for state in states)
    parts = ", ".join(f"{count} {state}" for state, count in counts.items())
    return f"{name}: {len(states)} runs: {parts}; {spent / total:.1%} of {total:.3g} FLOPs"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Columns as wide as they need; the first is left-aligned, and so are words."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
