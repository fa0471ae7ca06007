"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch

from xdlm_megatron.evaluation.bound import Bound, BoundEvaluator
from xdlm_megatron.evaluation.nelbo import NelboResult
from xdlm_megatron.model.build import whole_weights
from xdlm_megatron.tracking.tracker import Tracker
from xdlm_megatron.train.ending import FINISHED, REQUEUE, STOPPED, Progress, TrainingError
from xdlm_megatron.train.signals import StopRequest
from xdlm_megatron.train.spikes import Spike, remember, threshold_of, worst_samples
from xdlm_megatron.train.state import TrainState
from xdlm_megatron.train.step import StepResult, TrainStep


class Saver(Protocol):
    """Checkpoints as the loop sees them (checkpoint/writer.py); collective."""

    is_async: bool

    @property
    def in_flight(self) -> bool: ...

    @property
    def is_written(self) -> bool: ...

    def begin(self, state: TrainState) -> None: ...

    def publish(self) -> object: ...


@dataclass
class _Window:
    """What was measured since the last logged line."""

    started: float = field(default_factory=time.perf_counter)
    num_steps: int = 0
    num_tokens: int = 0
    grad_norm: float = float("nan")
    lr: float = float("nan")

    def add(self, result: StepResult, num_tokens: int) -> None:
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.grad_norm = result.grad_norm
        self.lr = result.lr

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before


@dataclass(frozen=True)
class _Seen:
    """What the processes tell each other after a step, summed: one small collective."""

    nelbo: float
    num_tokens: float
    stop: bool
    requeue: bool
    is_writing: bool


@dataclass
class Loop:
    """Runs `step` until the recipe's end or a stop; every process runs it in step with the others.

    peak_flops: of one process's device, for MFU. on_spike: called on every process.
    """

    step: TrainStep
    evaluator: BoundEvaluator | None
    tracker: Tracker
    saver: Saver
    peak_flops: float
    on_spike: Callable[[Spike], None] = lambda spike: None
    progress: Progress = field(default_factory=Progress)

    def run(self, state: TrainState, stop: StopRequest) -> str:
        """Returns "finished", "stopped" (a signal, train.stop_after_step) or "requeue" (a signal that asks).

        Raises:
            TrainingError: too many steps in a row were skipped.
            SaveError: a checkpoint could not be written.
        """
        config = self.step.config
        last_step = config.train.stop_after_step or config.train.num_steps
        window = _Window()
        seen = None
        while state.step < last_step:
            self.progress.doing = f"step {state.step + 1}"
            consumed_samples, consumed_tokens = state.consumed_samples, state.consumed_tokens
            result = self.step(state)
            window.add(result, state.consumed_tokens - consumed_tokens)
            seen = self._exchange(result, stop)
            self._account(state, seen, result, consumed_samples)
            stopping = seen.stop or seen.requeue
            hopeless = state.skipped_in_a_row >= config.train.max_skipped_steps
            ending = stopping or hopeless or state.step == last_step
            evaluating = state.step % config.evaluation.interval == 0 or (ending and not stopping)
            if state.step % config.train.log_interval == 0 or evaluating or ending:
                self._log(state, window)
                window = _Window()
            with window.paused():
                if self.saver.in_flight and (ending or not seen.is_writing):
                    self.progress.doing = f"publication of a checkpoint after step {state.step}"
                    self.saver.publish()
                if hopeless:
                    raise TrainingError(_hopeless(state))
                if evaluating:
                    strict = config.evaluation.bound == "always" or state.step == last_step
                    self._evaluate(state, strict)
                if state.step % config.checkpoint.save_interval == 0 or ending:
                    self.progress.doing = f"save of step {state.step}"
                    with whole_weights(self.step.chunks):
                        self.saver.begin(state)
                    if ending or not self.saver.is_async:
                        self.saver.publish()
            if stopping:
                break
        if state.step >= config.train.num_steps:
            return FINISHED
        return REQUEUE if seen is not None and seen.requeue else STOPPED

    def _exchange(self, result: StepResult, stop: StopRequest) -> _Seen:
        is_writing = self.saver.in_flight and not self.saver.is_written
        flags = torch.tensor([stop.stop, stop.requeue, is_writing], dtype=torch.float64)
        mine = torch.cat([result.nelbo, flags.to(result.nelbo.device)])
        nelbo, num_tokens, *sums = self.step.mesh.reduce_sum(mine).tolist()
        return _Seen(nelbo, num_tokens, *(bool(value) for value in sums))

    def _account(self, state: TrainState, seen: _Seen, result: StepResult, first_id: int) -> None:
        """Takes the step's loss into the next line and the recent losses; reports a spike."""
        state.unlogged[0] += seen.nelbo
        state.unlogged[1] += seen.num_tokens
        loss = seen.nelbo / max(seen.num_tokens, 1)
        factor = self.step.config.train.spike_factor
        if factor is None:
            return
        median, threshold = threshold_of(state.recent_losses, factor) or (math.nan, math.nan)
        if loss > threshold or not math.isfinite(loss):
            nelbo, num_tokens = self.step.mesh.reduce_sum(result.by_slot)
            by_slot = nelbo / num_tokens.clamp(min=1)
            self.on_spike(Spike(state.step, loss, median, threshold, worst_samples(by_slot, first_id)))
        if math.isfinite(loss):
            remember(state.recent_losses, loss)

    def _log(self, state: TrainState, window: _Window) -> None:
        nelbo_sum, num_tokens = state.unlogged
        state.unlogged = [0.0, 0.0]
        seconds = time.perf_counter() - window.started
        derived = self.step.derived
        tokens_per_second = window.num_tokens / seconds
        flops_per_second = tokens_per_second * derived.flops_per_token / derived.world_size
        self.tracker.log(
            state.step,
            {
                "consumed_samples": state.consumed_samples,
                "consumed_tokens": state.consumed_tokens,
                "consumed_flops": state.consumed_tokens * derived.flops_per_token,
                "train/nelbo": nelbo_sum / max(num_tokens, 1),  # a tiny batch may be all prompt
                "train/grad_norm": window.grad_norm,
                "train/lr": window.lr,
                "train/skipped_steps": state.skipped_steps,
                "perf/tokens_per_second": tokens_per_second,
                "perf/tokens_per_second_per_gpu": tokens_per_second / derived.world_size,
                "perf/seconds_per_step": seconds / window.num_steps,
                "perf/mfu": flops_per_second / self.peak_flops,
            },
        )

    def _evaluate(self, state: TrainState, strict: bool) -> None:
        if self.evaluator is None:
            return
        self.progress.doing = f"evaluation after step {state.step}"
        ema = self.step.ema
        with whole_weights(self.step.chunks), ema.applied() if ema is not None else nullcontext():
            if strict:
                found = self.evaluator(self.step.chunks)
                metrics = window_metrics(found.window) | bound_metrics(found.bound)
            else:
                metrics = window_metrics(self.evaluator.nelbo(self.step.chunks))
        self.tracker.log(state.step, metrics)


def _hopeless(state: TrainState) -> str:
    first = state.step - state.skipped_in_a_row + 1
    return (
        f"the {state.skipped_in_a_row} steps from {first} on had a non-finite gradient "
        "(train.max_skipped_steps), so the weights may be ruined, and a resume meets the same samples, "
        f"noise and updates again: look at them (tools/show_batch.py --step {first}), then start a run of "
        "another run.name, with the data mended or a lower optimizer.lr or optimizer.clip_grad"
    )


def window_metrics(window: NelboResult) -> dict[str, float]:
    """The paper's figure."""
    metrics = {
        "eval/valid/nelbo_per_token": window.nelbo_per_token,
        "eval/valid/nelbo_standard_error": window.standard_error,
        "eval/valid/perplexity": window.perplexity,
        "eval/valid/bits_per_byte": window.bits_per_byte,
    }
    return {name: value for name, value in metrics.items() if value is not None}


def bound_metrics(bound: Bound) -> dict[str, float]:
    """The strict bound by the names that `evaluate` gives it in its record."""
    metrics = {
        "eval/valid/bound/nats_per_token": bound.total.mean,
        "eval/valid/bound/standard_error": bound.total.standard_error,
        "eval/valid/bound/perplexity": bound.perplexity,
        "eval/valid/bound/bits_per_byte": bound.bits_per_byte,
    }
    return {name: value for name, value in metrics.items() if value is not None}
