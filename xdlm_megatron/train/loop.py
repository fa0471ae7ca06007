"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from xdlm_megatron.evaluation.nelbo import NelboEvaluator, NelboResult
from xdlm_megatron.tracking.tracker import Tracker
from xdlm_megatron.train.signals import StopRequest
from xdlm_megatron.train.state import TrainState
from xdlm_megatron.train.step import StepResult, TrainStep


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass
class _Window:
    """What was seen since the last logged line."""

    nelbo: torch.Tensor
    started: float = field(default_factory=time.perf_counter)
    num_steps: int = 0
    grad_norm: float = float("nan")
    lr: float = float("nan")

    def add(self, result: StepResult) -> None:
        self.nelbo += result.nelbo
        self.num_steps += 1
        self.grad_norm = result.grad_norm
        self.lr = result.lr

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before


@dataclass
class Loop:
    """Runs `step` until the recipe's end or a stop; every process runs it in step with the others.

    save: writes a checkpoint of the current state. peak_flops: of one process's device, for MFU.
    """

    step: TrainStep
    evaluator: NelboEvaluator | None
    tracker: Tracker
    save: Callable[[TrainState], Any]
    peak_flops: float

    def run(self, state: TrainState, stop: StopRequest) -> str:
        """Returns "finished", or "stopped" after a signal or train.stop_after_step. Raises TrainingError."""
        config, mesh = self.step.config, self.step.mesh
        last_step = config.train.stop_after_step or config.train.num_steps
        window = self._new_window()
        while state.step < last_step:
            window.add(self.step(state))
            stopping = mesh.any(bool(stop))
            hopeless = state.skipped_in_a_row >= config.train.max_skipped_steps
            ending = stopping or hopeless or state.step == last_step
            if state.step % config.train.log_interval == 0 or ending:
                self._log(state, window)
                window = self._new_window()
            if hopeless:
                raise TrainingError(_hopeless(state))
            with window.paused():
                if state.step % config.evaluation.interval == 0 or (ending and not stopping):
                    self._evaluate(state)
                if state.step % config.checkpoint.save_interval == 0 or ending:
                    self.save(state)
            if stopping:
                break
        return "finished" if state.step >= config.train.num_steps else "stopped"

    def _new_window(self) -> _Window:
        return _Window(torch.zeros(2, dtype=torch.float64, device=self.step.mesh.device))

    def _log(self, state: TrainState, window: _Window) -> None:
        nelbo_sum, num_tokens = self.step.mesh.reduce_sum(window.nelbo).tolist()
        seconds = time.perf_counter() - window.started
        derived = self.step.derived
        tokens_per_second = derived.tokens_per_step * window.num_steps / seconds
        flops_per_second = tokens_per_second * derived.flops_per_token / derived.world_size
        self.tracker.log(
            state.step,
            {
                "consumed_samples": state.consumed_samples,
                "consumed_tokens": state.consumed_tokens,
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

    def _evaluate(self, state: TrainState) -> None:
        if self.evaluator is None:
            return
        ema = self.step.ema
        with ema.applied() if ema is not None else nullcontext():
            result = self.evaluator(self.step.chunks)
        self.tracker.log(state.step, eval_metrics(result))


def _hopeless(state: TrainState) -> str:
    first = state.step - state.skipped_in_a_row + 1
    return (
        f"the {state.skipped_in_a_row} steps from {first} on had a non-finite gradient "
        "(train.max_skipped_steps), so the weights may be ruined: look at the data, then go on from a "
        f"checkpoint before step {first}, or start a run with a lower optimizer.lr"
    )


def eval_metrics(result: NelboResult) -> dict[str, float]:
    """The metrics of one held-out evaluation."""
    metrics = {
        "eval/valid/nelbo_per_token": result.nelbo_per_token,
        "eval/valid/nelbo_standard_error": result.standard_error,
        "eval/valid/perplexity": result.perplexity,
    }
    if result.bits_per_byte is not None:
        metrics["eval/valid/bits_per_byte"] = result.bits_per_byte
    return metrics
