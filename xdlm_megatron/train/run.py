"""A training run from its recipe: builds every part in order, resumes if asked, trains, closes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.transformer.module import MegatronModule

from xdlm_megatron.checkpoint.contents import load_model_state, model_state, optimizer_state
from xdlm_megatron.checkpoint.reader import (
    CheckpointError,
    check_whole,
    choose_start,
    find_checkpoint,
    load_checkpoint,
    load_plain_values,
)
from xdlm_megatron.checkpoint.summary import read_plain_values
from xdlm_megatron.checkpoint.writer import CheckpointWriter
from xdlm_megatron.config.derive import Derived, derive, head_fusion, keeps_documents_apart, run_folder
from xdlm_megatron.config.identity import changed_network
from xdlm_megatron.config.load import ConfigError, to_tree
from xdlm_megatron.config.record import last_start, run_params, run_tags
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_train_samples
from xdlm_megatron.evaluation.bound import BoundEvaluator, TimedObjective
from xdlm_megatron.evaluation.nelbo import build_evaluator
from xdlm_megatron.kernels.dispatch import Kernels
from xdlm_megatron.model.build import build_model, forget_training, unwrap, wrap_for_training
from xdlm_megatron.model.layer_spec import who_computes
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.model.transformer_config import DTYPES
from xdlm_megatron.optim.build import build_lr_schedule, build_optimizer, restore_fp8_weights
from xdlm_megatron.optim.ema import Ema
from xdlm_megatron.optim.offload import begin_moments
from xdlm_megatron.parallel.kernel_choice import choose_kernels_together
from xdlm_megatron.parallel.mesh import Mesh, open_mesh_for
from xdlm_megatron.parallel.process_modes import deterministic, tensor_parallel_overlap
from xdlm_megatron.tracking.console import ConsoleTracker
from xdlm_megatron.tracking.jsonl import JsonlTracker, flush_to_disk, truncate_after
from xdlm_megatron.tracking.mlflow import MlflowTracker
from xdlm_megatron.tracking.tracker import CompositeTracker, NoopTracker, Tracker
from xdlm_megatron.train.ending import (
    FINISHED,
    Progress,
    failures_explained,
    record_outcome,
)
from xdlm_megatron.train.lock import locked_run, on_main_in
from xdlm_megatron.train.loop import Loop
from xdlm_megatron.train.peak import peak_flops
from xdlm_megatron.train.provenance import (
    RECIPE,
    check_same_data,
    check_same_experiment,
    record_start,
    write_data,
    write_recipe,
)
from xdlm_megatron.train.signals import catch_stop_signals
from xdlm_megatron.train.spikes import SPIKES, Spike, append_spike
from xdlm_megatron.train.state import TrainState
from xdlm_megatron.train.step import TrainStep

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """The parts of a run that outlive a step."""

    config: RunConfig
    derived: Derived
    mesh: Mesh
    folder: Path
    chunks: list[MegatronModule]
    step: TrainStep
    evaluator: BoundEvaluator | None
    kernels: Kernels

    def state_to_save(self, state: TrainState) -> dict:
        """What a checkpoint of the run at `state` holds."""
        return self._sharded_state(is_loading=False) | self._plain_values(state)

    def load(self, path: Path) -> TrainState:
        """Takes model, optimizer, schedule and EMA from the checkpoint, whatever layout wrote it."""
        plain = load_plain_values(path)
        if (self.step.ema is not None) and "ema_updates" not in plain:
            raise CheckpointError(f"{path} holds no EMA and optimizer.ema_decay is on; turn it off to go on")
        values = load_checkpoint(path, self._sharded_state(is_loading=True), self.mesh)
        load_model_state([unwrap(chunk) for chunk in self.chunks], values)
        self.step.optimizer.load_state_dict(values["optimizer"])
        if self.config.precision.fp8_param_gather:
            restore_fp8_weights(self.step.optimizer, self.chunks)
        self.step.lr_schedule.load_state_dict(values["lr_schedule"])
        if self.step.ema is not None:
            self.step.ema.load(values["ema"], values["ema_updates"])
        return TrainState.from_dict(values["train_state"])

    def load_weights(self, path: Path) -> None:
        """Takes the model's weights alone; master weights and averages begin with them."""
        check_whole(path, self.mesh)
        chunks = [unwrap(chunk) for chunk in self.chunks]
        values = load_checkpoint(path, model_state(chunks, self.mesh.groups), self.mesh)
        load_model_state(chunks, values)
        self.step.optimizer.reload_model_params()
        if self.step.ema is not None:
            self.step.ema.restart()

    def _sharded_state(self, is_loading: bool) -> dict:
        groups = self.mesh.groups
        model = model_state([unwrap(chunk) for chunk in self.chunks], groups)
        state = dict(model)
        if not is_loading:
            begin_moments(self.step.optimizer)
        state |= optimizer_state(model, self.step.optimizer, self.step.lr_schedule, groups, is_loading)
        if self.step.ema is not None:
            state["ema"] = self.step.ema.sharded_state(model, is_loading)
        return state

    def _plain_values(self, state: TrainState) -> dict:
        values = {"train_state": state.to_dict(), "recipe": to_tree(self.config)}
        if self.step.ema is not None:
            values["ema_updates"] = self.step.ema.num_updates
        return values


class Saver:
    """Saves a run's state; the rest is the CheckpointWriter's."""

    def __init__(self, run: Run) -> None:
        kept = run.config.checkpoint
        self.is_async = kept.async_save
        self._run = run
        self._writer = CheckpointWriter(
            run.folder / CHECKPOINTS, run.mesh, kept.keep_last, kept.keep_every, kept.async_save
        )

    @property
    def in_flight(self) -> bool:
        return self._writer.in_flight

    @property
    def is_written(self) -> bool:
        return self._writer.is_written

    def begin(self, state: TrainState) -> None:
        self._writer.publish()  # first, so that the memory of its copies is free
        if self._run.mesh.is_main:
            flush_to_disk(self._run.folder / METRICS)
        self._writer.begin(state.step, self._run.state_to_save(state))

    def publish(self) -> None:
        self._writer.publish()

    def wait(self) -> None:
        self._writer.wait()


def build_run(config: RunConfig, mesh: Mesh) -> Run:
    """Data first (it is what users get wrong most), then model, optimizer, EMA and evaluation."""
    derived = derive(config, mesh.world_size)
    samples = build_train_samples(config, mesh.device, mesh.sequence_slice(config.data.seq_length))
    kernels = choose_kernels_together(config.train.kernels, mesh)
    how: dict[str, Any] = {"fuse_head": head_fusion(config), "ops": kernels.row_ops}
    objective = Objective(samples.noise, mesh, **how)
    evaluator = None
    if config.data.valid_prefix is not None:
        timed = TimedObjective(samples.noise, mesh, t_min=config.diffusion.t_min, **how)
        evaluator = BoundEvaluator(build_evaluator(config, mesh, timed))
    chunks = wrap_for_training(
        build_model(config, mesh),
        config.optimizer.use_distributed_optimizer,
        mesh,
        config.parallel.overlap_grad_reduce,
        config.parallel.overlap_param_gather,
    )
    optimizer = build_optimizer(config.optimizer, config.lr_schedule, chunks, mesh)
    lr_schedule = build_lr_schedule(config.lr_schedule, config.optimizer, config.train.num_steps, optimizer)
    ema = Ema(chunks, optimizer, config.optimizer.ema_decay, mesh) if config.optimizer.ema_decay else None
    step = TrainStep(config, derived, mesh, chunks, optimizer, lr_schedule, ema, samples, objective)
    return Run(config, derived, mesh, run_folder(config), chunks, step, evaluator, kernels)


def train(config: RunConfig, resume: bool = False, allow_fallback: bool = False) -> str:
    """Trains until the recipe's end, a signal or train.stop_after_step: "finished", "stopped" or "requeue".

    allow_fallback: where the latest checkpoint is damaged, resume from the newest whole one before it.

    Raises:
        ConfigError, DataError, CheckpointError, ValueError: the user's to mend, with the cure in the message.
        TrainingError: training cannot go on; the message is printed, by one process of the job.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(catch_stop_signals())
        progress = Progress()
        stack.enter_context(failures_explained(progress))
        stack.enter_context(deterministic(bool(config.model.mcore.get("deterministic_mode"))))
        mesh = stack.enter_context(open_mesh_for(config.parallel))
        _check_folder(config, resume)  # at once, and again when nobody else can change the answer
        folder = run_folder(config)
        if resume:  # first, so that a start that fails does not leave the outcome of the one before
            stack.enter_context(locked_run(folder, mesh))
        run = build_run(config, mesh)
        stack.callback(forget_training, run.chunks)
        sizes = config.data.seq_length, config.train.micro_batch_size
        stack.enter_context(tensor_parallel_overlap(run.chunks[0].config, *sizes))
        if not resume:  # last, so that a mistake leaves no folder
            stack.enter_context(locked_run(folder, mesh))
        saver = Saver(run)
        stack.callback(saver.wait)  # before the lock goes: what still writes, writes alone
        stack.enter_context(failures_explained(progress))  # and once more inside, before the mesh closes
        start = _choose_start(config, mesh, resume, allow_fallback)
        progress.folder = folder
        initial = _find_initial(config) if start is None else None
        progress.doing = f"load of {start or initial}" if start or initial else "start"
        if initial is not None:
            run.load_weights(initial)
        state = run.load(start) if start is not None else TrainState()
        mesh.barrier()
        on_main_in(folder, mesh, lambda: _prepare_folder(run, state, initial))
        peak, source = peak_flops(mesh.device, DTYPES[config.precision.dtype])
        if mesh.is_main:
            print(describe(run, state, source), flush=True)
        tracker = _build_tracker(run, state)
        status = "FAILED"
        try:
            loop = Loop(run.step, run.evaluator, tracker, saver, peak, _spike_reporter(run), progress)
            outcome = loop.run(state, stop)
            status = "FINISHED" if outcome == FINISHED else "KILLED"
        finally:
            tracker.close(status)
        if mesh.is_main:
            record_outcome(run.folder, f"{outcome} at step {state.step}")
            print(f"{outcome} at step {state.step}; run folder {run.folder}", flush=True)
        return outcome


def _prepare_folder(run: Run, state: TrainState, initial: Path | None) -> None:
    """Before the first step, by the main process: every file says what it will say."""
    (run.folder / CHECKPOINTS).mkdir(exist_ok=True)  # before the recipe: a run without it has lost it
    if not (run.folder / RECIPE).exists():
        write_data(run.folder, run.config)
        write_recipe(run.folder, run.config)
    record_start(run.folder, run.config, state.step, run.mesh.world_size, initial)
    for name in (METRICS, SPIKES):
        truncate_after(run.folder / name, state.step)


def _spike_reporter(run: Run) -> Callable[[Spike], None]:
    def report(spike: Spike) -> None:
        if run.mesh.is_main:
            append_spike(run.folder, spike)
            print(spike, file=sys.stderr, flush=True)

    return report


def describe(run: Run, state: TrainState, peak_source: str) -> str:
    """What starts, in a few lines."""
    config, derived = run.config, run.derived
    parallel = config.parallel
    start = f"resumes at step {state.step}" if state.step else "starts"
    if not state.step and config.train.init_from is not None:
        start += f" from the weights in {config.train.init_from}"
    return "\n".join(
        [
            f"{config.run.name} {start}: uniform_ratio {config.diffusion.uniform_ratio}, "
            f"{derived.num_parameters / 1e6:.1f}M parameters, {_bits(config)} on {run.mesh.device.type}",
            f"  {_who_computes(run)}",
            f"  loss by {run.kernels.reason}",
            f"  layout: tensor {parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} x data "
            f"{derived.data_parallel_size}, "
            f"{derived.num_microbatches} micro-batches of {config.train.micro_batch_size} a step",
            f"  budget: {config.train.num_steps} steps of {derived.tokens_per_step} tokens; training set of "
            f"{run.step.samples.dataset.summary}; MFU against: {peak_source}",
        ]
    )


def _who_computes(run: Run) -> str:
    optimizer, masked = run.config.optimizer, keeps_documents_apart(run.config.data)
    offloaded = optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0
    return who_computes(run.chunks[0].config, masked, offloaded)


def _bits(config: RunConfig) -> str:
    precision = config.precision
    if precision.fp8 is None:
        return precision.dtype
    return f"{precision.dtype} and FP8 ({precision.fp8}, {precision.fp8_recipe})"


def _check_folder(config: RunConfig, resume: bool) -> None:
    """A run folder is never overwritten and never restarted in silence."""
    folder = run_folder(config)
    exists = (folder / RECIPE).exists()
    if resume and not exists:
        raise CheckpointError(f"{folder} holds no run to resume; leave --resume out to start it")
    if exists and not resume:
        raise CheckpointError(f"{folder} holds a run; add --resume to go on, or choose another run.name")
    if resume:
        check_same_experiment(folder, config)
        check_same_data(folder, config)
    else:
        _find_initial(config)


def _find_initial(config: RunConfig) -> Path | None:
    """The checkpoint whose weights a new run begins with. Raises CheckpointError and ConfigError."""
    if config.train.init_from is None:
        return None
    path = find_checkpoint(Path(config.train.init_from))
    if path is None:
        raise CheckpointError(
            f"train.init_from={config.train.init_from} holds no checkpoint; make one by `convert RECIPE "
            "--from-hf FOLDER`, or name a run's folder checkpoints"
        )
    changed = changed_network(read_plain_values(path)["recipe"], config, with_noise=False)
    if changed:
        lines = [f"  {name}: there {there!r}, in the recipe {here!r}" for name, there, here in changed]
        cure = "correct the recipe, or name another checkpoint"
        raise ConfigError("\n".join([f"train.init_from: {path} is of another network; {cure}", *lines]))
    if config.precision.fp8_param_gather:
        raise CheckpointError(
            "precision.fp8_param_gather=true would round the master weights of train.init_from to FP8; begin "
            "with false, a --resume may turn it on"
        )
    return path


def _choose_start(config: RunConfig, mesh: Mesh, resume: bool, allow_fallback: bool) -> Path | None:
    """The checkpoint to go on from, None for a new run. Raises CheckpointError and ConfigError."""
    _check_folder(config, resume)
    if not resume:
        return None
    checkpoints = run_folder(config) / CHECKPOINTS
    if not checkpoints.is_dir():
        raise CheckpointError(
            f"{checkpoints} is gone; put it back, or remove the run folder to start the run over"
        )
    start = choose_start(checkpoints, mesh, allow_fallback)
    if start is None and mesh.is_main:
        print(
            f"{checkpoints} is empty: the run was interrupted before it saved, and starts again", flush=True
        )
    return start


def _build_tracker(run: Run, state: TrainState) -> Tracker:
    if not run.mesh.is_main:
        return NoopTracker()
    config = run.config
    trackers: list[Tracker] = [
        JsonlTracker(run.folder / METRICS),
        ConsoleTracker(config.train.num_steps, state.step),
    ]
    if config.tracking.mlflow is not None:
        trackers.append(
            MlflowTracker(
                run.folder,
                None if config.tracking.mlflow == "local" else config.tracking.mlflow,
                config.tracking.experiment,
                config.run.name,
                params=run_params(config, run.derived),
                tags=run_tags(config, last_start(run.folder)),
                parent_run=config.tracking.parent_run,
            )
        )
    tracker = CompositeTracker(trackers)
    tracker.log_artifact(run.folder / RECIPE)
    return tracker
