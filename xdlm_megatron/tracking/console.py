"""The console of rank 0: a progress bar on a terminal, one plain line a log interval anywhere else."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from xdlm_megatron.tracking.tracker import Status

_BAR_FORMAT = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}"


class ConsoleTracker:
    """Shows where a run of `total_steps` steps is; `initial_step` is the step it resumed from (0: a new run).

    Reads `train/nelbo` (nats per token), `train/lr`, `train/grad_norm`, `perf/tokens_per_second`, `perf/mfu`
    (a fraction) and `perf/seconds_per_step` where they are given; `eval/...` metrics get a line of their own.
    `stream` is stderr by default; a terminal gets the bar.
    """

    def __init__(self, total_steps: int, initial_step: int = 0, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.stream = sys.stderr if stream is None else stream
        self._step = initial_step
        self._start = (initial_step, time.monotonic())
        self._bar: tqdm[Any] | None = None
        if self.stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=initial_step,
                file=self.stream,
                bar_format=_BAR_FORMAT,
                dynamic_ncols=True,
                mininterval=0,  # redrawn when something is logged, not by a clock
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evaluation:
            self._line(f"step {step}: " + ", ".join(f"{name} {_short(x)}" for name, x in evaluation.items()))
        if "train/nelbo" not in metrics:
            return
        figures = self._figures(step, metrics)
        if self._bar is None:
            share = step / self.total_steps if self.total_steps else 1.0
            self._line(f"step {step}/{self.total_steps} ({share:.1%}) | {' | '.join(figures)}")
        else:
            self._bar.set_postfix_str(" ".join(figures), refresh=False)
            self._bar.update(step - self._step)
            self._bar.refresh()
        self._step = step

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing: `show-config` prints the recipe."""

    def log_artifact(self, path: str | Path) -> None:
        """Nothing to show."""

    def close(self, status: Status) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if status == "FAILED":  # how a run ended well, its caller says
            self._line(f"failed at step {self._step} of {self.total_steps}")

    def _line(self, text: str) -> None:
        if self._bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.write(text, file=self.stream)

    def _figures(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        figures = [f"nelbo {metrics['train/nelbo']:.4f}"]
        if "train/lr" in metrics:
            figures.append(f"lr {metrics['train/lr']:.2e}")
        if "train/grad_norm" in metrics and self._bar is None:  # the bar has no room for it
            figures.append(f"grad {metrics['train/grad_norm']:.3g}")
        if "perf/tokens_per_second" in metrics:
            figures.append(f"{with_unit(metrics['perf/tokens_per_second'])} tok/s")
        if "perf/mfu" in metrics:
            figures.append(f"MFU {metrics['perf/mfu']:.1%}")
        figures.append(f"{duration(self._seconds_left(step, metrics))} left")
        return figures

    def _seconds_left(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """By the last interval's speed if it is given, else by the time since the start; None: unknown."""
        first_step, start = self._start
        seconds_per_step = metrics.get("perf/seconds_per_step")
        if seconds_per_step is None:
            if step <= first_step:
                return None
            seconds_per_step = (time.monotonic() - start) / (step - first_step)
        seconds = max(0, self.total_steps - step) * seconds_per_step
        return seconds if 0 <= seconds < float("inf") else None


def with_unit(value: float) -> str:
    """1234567 -> '1.23M': three digits and a metric prefix."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """'2d 03:04' above a day, else '3:04:05' or '4:05'; '?' for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, day_hours = divmod(hours, 24)
    if days:
        return f"{days}d {day_hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(value: float) -> str:
    """Integers as they are, floats with five digits."""
    return str(value) if isinstance(value, int) else f"{value:.5g}"
