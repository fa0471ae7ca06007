"""The `Tracker` protocol, and the composite that lets several of them live together."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """A place where a run's figures go. One process of a job (rank 0) owns it.

    A tracker whose loss would lose data sets the class attribute `essential = True`: its errors stop the run.
    Every other tracker is a convenience, and its errors are reported once and swallowed by the composite.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` at optimizer step `step`."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record facts about the run that do not change, such as the resolved recipe's knobs."""

    def log_artifact(self, path: str | Path) -> None:
        """Record a finished file (the recipe, a figure)."""

    def close(self, status: Status) -> None:
        """End the run's record. A closed tracker is not used again."""


class NoopTracker:
    """Records nothing: for ranks other than 0, and for tests."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_artifact(self, path: str | Path) -> None: ...

    def close(self, status: Status) -> None: ...


class CompositeTracker:
    """Hands every call to each tracker in order, and keeps training alive when one of them fails.

    The first failure of a tracker is one line on stderr that names it; later calls still reach it, so that a
    tracker that recovers goes on. The failure of an `essential` tracker is raised, after all the others had
    their call.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)
        self._reported: set[int] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each("log", lambda tracker: tracker.log(step, metrics))

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._each("log_params", lambda tracker: tracker.log_params(params))

    def log_artifact(self, path: str | Path) -> None:
        self._each("log_artifact", lambda tracker: tracker.log_artifact(path))

    def close(self, status: Status) -> None:
        self._each("close", lambda tracker: tracker.close(status))

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        fatal: Exception | None = None
        for index, tracker in enumerate(self.trackers):
            try:
                call(tracker)
            except Exception as error:
                if getattr(tracker, "essential", False):
                    fatal = fatal or error
                elif index not in self._reported:
                    self._reported.add(index)
                    report(f"{type(tracker).__name__}.{what} failed: {one_line(error)}; training goes on")
        if fatal is not None:
            raise fatal


def report(message: str, file: TextIO | None = None) -> None:
    """One line on stderr (or `file`); a closed one must not stop training either."""
    try:
        print(f"tracking: {message}", file=file or sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def one_line(error: BaseException) -> str:
    """`Type: message` of an error, on one line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:299] + "…"
