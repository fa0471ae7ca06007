"""The verb `sweep`: what would be run, how far it is, and what is missing started, here or by Slurm."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from xdlm_megatron.config.identity import changed_fields
from xdlm_megatron.config.load import ConfigError, dump_recipe, load_recipe
from xdlm_megatron.launch.attempt import DONE, FAILED, REQUEUE, SweepFolder
from xdlm_megatron.launch.gpus import GPUS
from xdlm_megatron.launch.local import LocalRuns
from xdlm_megatron.launch.progress import last_records
from xdlm_megatron.launch.submit import Resources, SubmitError, active_runs, share, submit, submitting
from xdlm_megatron.scaling.collect import HELD_OUT_LOSS, STANDARD_ERROR, run_point
from xdlm_megatron.scaling.sweep import SweepPlan
from xdlm_megatron.scaling.sweep_state import FINISHED, RUNNING, TO_DO, RunState, read_states
from xdlm_megatron.scaling.sweep_table import plan_table, status_table, summary


def dry_run(plan: SweepPlan) -> int:
    """Prints the runs."""
    print(plan_table(plan))
    return 0


def status(plan: SweepPlan) -> int:
    """Prints how far each run is; without an answer from Slurm, by the files alone."""
    folder = SweepFolder(plan.folder)
    queue: Mapping[str, str] = {}
    try:
        queue = active_runs(folder)
    except SubmitError as error:
        print(f"without Slurm's queue: {error}", file=sys.stderr)
    print(status_table(plan.name, read_states(folder, plan.points, queue)))
    return 0


def write_table(plan: SweepPlan, path: Path) -> int:
    """A line for each finished run: what `fit --points` reads, and how it was trained.

    One without a held-out loss at its end is left out, and said.
    """
    folder, rows = SweepFolder(plan.folder), []
    states = read_states(folder, plan.points, {})
    for state in states:
        if state.state == FINISHED:
            config, figures = state.point.config, state.point.figures
            records = last_records(folder.run(state.point.name))
            try:
                point = run_point(state.point.name, config, records, "total", HELD_OUT_LOSS)
            except ValueError as error:
                print(f"{state.point.name} is left out: it {error}", file=sys.stderr)
                continue
            last = next(record for record in reversed(records) if HELD_OUT_LOSS in record)
            standard_error = last.get(STANDARD_ERROR)  # runs of an older version have none
            rows.append(
                {
                    "run": point.run,
                    "params": figures.num_parameters,
                    "non_embedding_params": figures.num_non_embedding_parameters,
                    "tokens": figures.total_tokens,
                    "flops": f"{point.flops:.6g}",
                    "uniform_ratio": point.uniform_ratio,
                    "loss": f"{point.loss:.6f}",
                    "standard_error": "" if standard_error is None else f"{standard_error:.6f}",
                    "seed": config.run.seed,
                    "steps": config.train.num_steps,
                    "batch": config.train.global_batch_size,
                    "lr": config.optimizer.lr,
                    "cpu_seconds": "" if state.cpu_seconds is None else round(state.cpu_seconds, 1),
                }
            )
    if not rows:
        raise ConfigError(f"{plan.folder} holds no finished run with a held-out loss; see --status")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path}: {len(rows)} of {len(states)} runs")
    return 0


def run_here(plan: SweepPlan, at_once: int) -> int:
    """Trains on this machine what is not finished; the exit status is 1 where a run failed.

    75 where nothing but SIGUSR1 or SIGUSR2 has stopped it, as ahead of a time limit: call it again.
    """
    folder = _prepare(plan)
    queue = active_runs(folder)
    if queue:
        raise SubmitError(
            f"Slurm has {len(queue)} of the runs ({next(iter(queue))}, ...); scancel them, or wait"
        )
    states = read_states(folder, plan.points, {})
    todo = [state.point for state in states if state.state != FINISHED]
    runs = LocalRuns(folder, {point.name: point.world for point in todo}, at_once)
    with _Display(states) as display:
        statuses = runs.run(lambda: display.show(read_states(folder, plan.points, {})))
    states = read_states(folder, plan.points, {})
    print(summary(plan.name, states))
    status = REQUEUE if runs.requeue else FAILED
    for state in states:
        code = statuses.get(state.point.name, DONE)
        if code not in (DONE, REQUEUE) and state.state != FINISHED:
            words = state.remark or f"status {code}, see {folder.log(state.point.name)}"
            print(f"error: {state.point.name}: {words}", file=sys.stderr)
            status = FAILED
    unfinished = len(states) - sum(state.state == FINISHED for state in states)
    if unfinished:
        print(f"{unfinished} runs are not finished; call it again to go on", file=sys.stderr)
        return status
    return DONE


def submit_missing(plan: SweepPlan) -> int:
    """Submits what is neither finished nor in Slurm's hands; one array for each number of processes."""
    folder = _prepare(plan)
    with submitting(folder):
        states = read_states(folder, plan.points, active_runs(folder))
        arrays: dict[int, list[str]] = {}
        for state in states:
            if state.state in TO_DO:
                arrays.setdefault(state.point.world, []).append(state.point.name)
        caps = share(plan.sweep.max_jobs, {world: len(names) for world, names in arrays.items()})
        for world, names in arrays.items():
            jobs = submit(folder, names, _resources(plan, world), caps[world])
            print(
                f"submitted {len(names)} runs of {world} processes, {caps[world]} at a time: "
                f"job {', '.join(jobs)}"
            )
        print(summary(plan.name, read_states(folder, plan.points, active_runs(folder))))
    return 0


def _resources(plan: SweepPlan, world: int) -> Resources:
    sweep = plan.sweep
    per_node = GPUS[sweep.gpu].per_node if sweep.gpu else world
    if world > per_node and world % per_node:
        raise ConfigError(f"sweep.gpus: {world} GPUs are no whole number of nodes of {per_node}; change it")
    nodes = max(1, world // per_node)
    return Resources(
        nodes=nodes,
        tasks_per_node=world // nodes,
        gpus=sweep.gpu is not None,
        minutes=max(1, round(60 * sweep.hours)),
        options=tuple(sweep.sbatch.items()),
    )


def _prepare(plan: SweepPlan) -> SweepFolder:
    """The sweep's folder with every run's recipe. Raises ConfigError where a run began with another one."""
    folder = SweepFolder(plan.folder)
    for point in plan.points:
        begun = folder.run(point.name) / "recipe.yaml"
        changed = changed_fields(load_recipe(begun), point.config) if begun.exists() else []
        if changed:
            name, before, now = changed[0]
            raise ConfigError(
                f"{folder.run(point.name)} began with {name}={before!r}, now it is {now!r} (one of "
                f"{len(changed)} changes); change it back, or give the sweep another run.name"
            )
    folder.make()
    for point in plan.points:
        text = dump_recipe(point.config)
        path = folder.recipe(point.name)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            aside.write_text(text, encoding="utf-8")
            aside.rename(path)
    return folder


class _Display:
    """A bar over the FLOPs of all runs, with rate and time left, on a terminal; a line for each run's end."""

    def __init__(self, states: Sequence[RunState]) -> None:
        self._finished = _finished(states)
        self._bar = tqdm(
            total=sum(state.point.flops for state in states),
            initial=_spent(states),
            unit="FLOP",
            unit_scale=True,
            disable=None,  # where there is no terminal
            smoothing=0.05,
            dynamic_ncols=True,
        )

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, states: Sequence[RunState]) -> None:
        for state in states:
            if state.point.name in _finished(states) - self._finished:
                loss = "" if state.loss is None else f", loss {state.loss:.4f}"
                self._bar.write(f"{state.point.name}: finished{loss}")
        self._finished = _finished(states)
        running = [state.point.name for state in states if state.state == RUNNING]
        self._bar.set_description_str(f"{len(self._finished)}/{len(states)} runs", refresh=False)
        self._bar.set_postfix_str(", ".join(running), refresh=False)
        self._bar.update(_spent(states) - self._bar.n)


def _finished(states: Sequence[RunState]) -> set[str]:
    return {state.point.name for state in states if state.state == FINISHED}


def _spent(states: Sequence[RunState]) -> float:
    """FLOPs."""
    return sum(state.share * state.point.flops for state in states)
