"""Runs of a sweep on this machine, some at a time."""

from __future__ import annotations

import math
import os
import signal
import sys
import types
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

from xdlm_megatron.launch.attempt import TAKEN, USER_ERROR, Attempt, SweepFolder

_SHOW_SECONDS = 1.0
_ENVIRONMENT = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # several runs share the cores


class LocalRuns:
    """Starts each run at most once, in order, `at_once` of them at a time; processes: how many each takes.

    A run that another sweep is training is waited for. A mistake of the user's (exit status 2) is likely
    every run's: nothing more is started.

    requeue: whether a signal that comes ahead of a time limit has asked to stop, and to be called again.
    """

    requeue = False

    def __init__(self, sweep: SweepFolder, processes: Mapping[str, int], at_once: int) -> None:
        self.sweep, self.processes, self.at_once = sweep, processes, at_once
        self._halted = False
        self._active: dict[str, Attempt] = {}

    def run(self, show: Callable[[], object]) -> dict[str, int]:
        """The exit status of every run that was started here; `show` is called every second until then."""
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                stack.callback(signal.signal, number, signal.signal(number, self._ask_to_stop))
            pool = stack.enter_context(ThreadPoolExecutor(self.at_once))
            futures: dict[str, Future[int]] = {name: pool.submit(self._run, name) for name in self.processes}
            while wait(futures.values(), timeout=_SHOW_SECONDS).not_done:
                show()
        show()
        statuses = {name: future.result() for name, future in futures.items()}
        return {name: status for name, status in statuses.items() if status != TAKEN}

    def _ask_to_stop(self, number: int, frame: types.FrameType | None) -> None:
        """What trains saves and ends; nothing more is started."""
        self._halted = True
        self.requeue |= number in (signal.SIGUSR1, signal.SIGUSR2)
        for attempt in list(self._active.values()):
            attempt.stop(signal.SIGTERM)  # the one that torchrun passes on

    def _run(self, name: str) -> int:
        attempt = self._active[name] = Attempt(
            self.sweep, name, lambda: self._command(name), _ENVIRONMENT, patience=math.inf
        )
        try:
            status = TAKEN if self._halted else attempt()
        finally:
            del self._active[name]
        self._halted |= status == USER_ERROR
        return status

    def _command(self, name: str) -> list[str]:
        command = [sys.executable]
        if self.processes[name] > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command += [str(self.processes[name])]
        command += ["-m", "xdlm_megatron", "train", str(self.sweep.recipe(name))]
        return [*command, "--resume"] if (self.sweep.run(name) / "recipe.yaml").exists() else command
