"""The verb `study`: trains what is missing of a sweep, measures every model, writes tables and pictures."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

from xdlm_megatron.config.load import ConfigError
from xdlm_megatron.launch.attempt import SweepFolder
from xdlm_megatron.scaling.sweep import SweepPlan
from xdlm_megatron.scaling.sweep_run import run_here
from xdlm_megatron.scaling.sweep_state import FINISHED, read_states
from xdlm_megatron.study.collect import Results, collect, model_name, write_rows
from xdlm_megatron.study.measure import measure
from xdlm_megatron.study.plot import draw_study
from xdlm_megatron.study.protocol import Protocol, plan_jobs
from xdlm_megatron.study.tables import likelihood, write_tables


def study(plan: SweepPlan, protocol: Protocol, at_once: int, output: Path) -> int:
    """Exit status: 0 when all is done, else that of the sweep (`run_here`). Call it again to go on."""
    _check(plan, protocol)
    status = run_here(plan, at_once)
    if status:
        return status
    folder = SweepFolder(plan.folder)
    jobs = [job for point in plan.points for job in plan_jobs(folder.run(point.name), protocol)]
    measure(jobs, at_once, folder.own / "measure.log")
    results = collect(jobs, protocol.dynamics_steps)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("bounds", "accuracies", "samples"):
        write_rows(output / f"{name}.csv", getattr(results, name))
    page = write_tables(results, f"Study: {plan.name}", _facts(plan, protocol, results))
    (output / "README.md").write_text(page, encoding="utf-8")
    draw_study(results, output)
    print(f"{likelihood(results)}\n\n{output}: README.md, tables as .csv, pictures as .png", flush=True)
    return 0


def _check(plan: SweepPlan, protocol: Protocol) -> None:
    """What would be found out after hours. Raises ConfigError."""
    if len(plan.sweep.sizes) > 1 or len(plan.sweep.design.budgets) > 1:
        raise ConfigError(
            f"{plan.name}: a study compares models of one size and one budget; give it one each"
        )
    models = Counter((model_name(point.config), point.config.run.seed) for point in plan.points)
    (name, seed), number = models.most_common(1)[0]
    if number > 1:
        raise ConfigError(
            f"{plan.name}: {number} runs are {name} of seed {seed}; a study tells models by "
            "diffusion.uniform_ratio and model.autoregressive alone, so vary nothing else but run.seed"
        )
    if all(point.config.model.autoregressive for point in plan.points):
        raise ConfigError(f"{plan.name}: no model of the study is a denoiser; add one")
    if not all(point.config.optimizer.ema_decay for point in plan.points):
        raise ConfigError(
            f"{plan.name}: a study measures averaged weights, and optimizer.ema_decay=0 keeps none; set it"
        )
    if plan.points[0].config.data.valid_prefix is None:
        raise ConfigError(f"{plan.name}: a study needs held-out text; set data.valid_prefix")
    if protocol.scorer is not None:
        if not protocol.scorer.exists():
            raise ConfigError(f"--scorer {protocol.scorer}: no such folder or file; correct the path")
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("--scorer needs transformers; pip install 'xdlm_megatron[scorer]'")


def _facts(plan: SweepPlan, protocol: Protocol, results: Results) -> list[str]:
    """How it was made."""
    point = plan.points[0]
    states = read_states(SweepFolder(plan.folder), plan.points, {})
    seconds = sum(state.cpu_seconds or 0.0 for state in states if state.state == FINISHED)
    scorer = "none" if results.scorer is None else results.scorer
    return [
        f"{len(plan.points)} runs of {point.figures.num_parameters:,} parameters and "
        f"{point.figures.total_tokens:,} tokens each, {point.flops:.3g} FLOPs; "
        f"{seconds / 60:.0f} minutes of CPU time to train",
        f"{protocol.num_samples} samples of {point.config.data.seq_length} tokens a model, seed and setting; "
        f"scorer: {scorer}",
        "± and brackets: 95 % intervals over seeds (Student's t); brackets of perplexities on the log scale",
        "columns: docs/evaluation.md; low H: share of samples with less entropy than 99 % of held-out text",
    ]
