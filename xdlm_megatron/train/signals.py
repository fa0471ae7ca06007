"""Signals ask the run to save and end after the step.

SIGINT and SIGTERM: stop. SIGUSR1 and SIGUSR2, which schedulers send ahead of a time limit or a preemption:
stop, and ask to be started again. A second SIGINT ends at once.
"""

from __future__ import annotations

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Set by signals, read once a step. A wish to be requeued outlives later signals that only stop."""

    def __init__(self) -> None:
        self.stop = False
        self.requeue = False

    def __bool__(self) -> bool:
        return self.stop or self.requeue


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Handles the signals inside the block, as before outside it."""
    request = StopRequest()

    def handle(number: int, frame: types.FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number in REQUEUE_SIGNALS:
            request.requeue = True
        else:
            request.stop = True

    before = {number: signal.signal(number, handle) for number in (*STOP_SIGNALS, *REQUEUE_SIGNALS)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
