"""One start of a run of a sweep: claimed, so that nobody else starts it; trained; noted down."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdlm_megatron.launch.progress import is_finished
from xdlm_megatron.tracking.store import NO_LOCKS

DONE, FAILED, USER_ERROR, REQUEUE = 0, 1, 2, 75  # exit statuses of training (__main__.py)
TAKEN = -1000  # no exit status: finished before, or somebody else is at it
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep keeps what: run folders in `folder`, its own files in `folder`/sweep."""

    folder: Path

    @property
    def own(self) -> Path:
        return self.folder / "sweep"

    def run(self, name: str) -> Path:
        return self.folder / name

    def recipe(self, name: str) -> Path:
        return self.own / "recipes" / f"{name}.yaml"

    def log(self, name: str) -> Path:
        """What training prints, of all its starts."""
        return self.own / "logs" / f"{name}.log"

    def claim(self, name: str) -> Path:
        return self.own / "claims" / name

    @property
    def attempts(self) -> Path:
        """A JSON line for the begin and the end of every start of every run."""
        return self.own / "attempts.jsonl"

    def make(self) -> None:
        for part in ("recipes", "logs", "claims", "submissions"):
            (self.own / part).mkdir(parents=True, exist_ok=True)


class Attempt:
    """Trains one run by what `command` gives, unless it is finished or claimed.

    patience: seconds to wait for another process's claim; then it goes on from where that one got.
    """

    def __init__(
        self,
        sweep: SweepFolder,
        name: str,
        command: Callable[[], Sequence[str]],
        environment: Mapping[str, str],
        patience: float,
    ) -> None:
        self.sweep, self.name, self.patience = sweep, name, patience
        self._command, self._environment = command, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0  # the signal to pass on

    def __call__(self) -> int:
        """The exit status of training; TAKEN where there was nothing to do."""
        claim = self._claim()
        if claim is None:
            return TAKEN
        try:
            return TAKEN if self._asked or is_finished(self.sweep.run(self.name)) else self._train(claim)
        finally:
            os.close(claim)

    def stop(self, signal_number: int) -> None:
        """Passes a signal on to training, which saves and ends. From a handler, or another thread."""
        self._asked = signal_number
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal_number)  # Popen.send_signal would take what wait4 waits for

    def _claim(self) -> int | None:
        deadline = time.monotonic() + self.patience
        while True:
            claim = take_claim(self.sweep.claim(self.name))
            if claim is not None or self._asked or time.monotonic() > deadline:
                return claim
            time.sleep(_POLL_SECONDS)

    def _train(self, claim: int) -> int:
        started = time.time()
        self._note(event="begin", time=started)
        with self.sweep.log(self.name).open("ab") as log:
            # The claim goes with the process that trains: it holds where the one that started it is killed.
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
                start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
                pass_fds=[claim],
            )
            if self._asked:  # while it was being started
                self.stop(self._asked)
            _, status, usage = os.wait4(self._process.pid, 0)
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        used = {"seconds": time.time() - started, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        self._note(event="end", time=time.time(), status=code, **used)
        return code

    def _note(self, **what: Any) -> None:
        line = json.dumps({"run": self.name, **what}) + "\n"
        with self.sweep.attempts.open("ab", buffering=0) as file:  # one write: lines of others stay whole
            file.write(line.encode())


def take_claim(path: Path) -> int | None:
    """A file descriptor that holds the claim until it and its copies in other processes are closed.

    None: somebody else holds it. Works between machines where the file system's locks do; where it has none,
    Slurm's queue alone keeps runs apart.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return file


def is_claimed(path: Path) -> bool:
    """Whether a process trains the run at this moment."""
    if not path.exists():
        return False
    claim = take_claim(path)
    if claim is not None:
        os.close(claim)
    return claim is None
