"""Runs programs that a model wrote, apart from everything: no network, limits, a process group of their own.

Each program is a process with namespaces of its own (user, network, process ids), in an empty folder, with an
empty environment and limits on memory, time, files and processes; whatever it starts dies with it. It has the
standard library alone. This keeps accidents in; for programs that may attack, use a virtual machine.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

NOBODY = 65534
MIB = 1 << 20
_NAMESPACES = ["--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
# Not a virtual environment's: programs need not see its packages. The other is for where nobody cannot read
# the first.
_INTERPRETERS = (os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "/usr/bin/python3")
_CONNECT = "import socket; socket.create_connection(('127.0.0.1', {port}), 2); print('connected')"


class ExecutionError(ValueError):
    """Programs cannot be run apart on this machine, or by this user."""


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed out"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """seconds: of wall time, and of CPU time; memory_mib: address space; file_mib: of every file written."""

    seconds: float = 10.0
    memory_mib: int = 1024
    file_mib: int = 8
    processes: int = 64


@dataclass(frozen=True)
class Result:
    """error: the last line that the program said on its way out; "" where it passed."""

    outcome: Outcome
    error: str = ""


class Sandbox:
    """Runs programs one at a time. Raises ExecutionError where they could not be kept apart.

    allow_root: run as root all the same, the programs then as nobody.
    """

    def __init__(self, limits: Limits | None = None, allow_root: bool = False) -> None:
        self._limits = limits or Limits()
        self._as_nobody = os.geteuid() == 0
        if self._as_nobody and not allow_root:
            raise ExecutionError("programs of a model are not run as root; use another user, or --allow-root")
        if shutil.which("unshare") is None:
            raise ExecutionError(
                "unshare (util-linux) is missing, and with it the way to cut off the network"
            )
        self.interpreter = self._find_interpreter()
        self._check_network()

    def run(self, program: str) -> Result:
        """Runs Python source to its end; passed is exit status 0."""
        with tempfile.TemporaryDirectory(prefix="program-") as name:
            folder = Path(name)
            (folder / "program.py").write_text(program, encoding="utf-8")
            (folder / "output").touch()
            if self._as_nobody:
                for path in (folder, *folder.iterdir()):
                    os.chown(path, NOBODY, NOBODY)
            with (folder / "output").open("wb") as output:
                process = subprocess.Popen(
                    ["unshare", *_NAMESPACES, self.interpreter, "-I", "program.py"],
                    cwd=folder,
                    env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=self._confine(),
                )
                try:
                    status = process.wait(self._limits.seconds)
                except subprocess.TimeoutExpired:
                    return Result(Outcome.TIMED_OUT, f"no end after {self._limits.seconds:g} s")
                finally:
                    _kill_group(process)
            if status == 0:
                return Result(Outcome.PASSED)
            said = (folder / "output").read_bytes()[-4096:].decode("utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), f"exit status {status}")
            return Result(Outcome.FAILED, last[:200])

    def _confine(self) -> Callable[[], None]:
        limits, as_nobody = self._limits, self._as_nobody
        cpu_seconds = math.ceil(limits.seconds)
        bounds = {
            resource.RLIMIT_AS: limits.memory_mib * MIB,
            resource.RLIMIT_CPU: cpu_seconds,
            resource.RLIMIT_FSIZE: limits.file_mib * MIB,
            resource.RLIMIT_NPROC: limits.processes,
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_CORE: 0,
        }

        def confine() -> None:
            os.umask(0o077)
            for kind, bound in bounds.items():
                resource.setrlimit(kind, (bound, bound))
            if as_nobody:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)

        return confine

    def _find_interpreter(self) -> str:
        """The first that runs a program here."""
        said = ""
        for self.interpreter in _INTERPRETERS:
            worked = self.run("pass")
            if worked.outcome is Outcome.PASSED:
                return self.interpreter
            said = said or worked.error
        raise ExecutionError(
            f"programs cannot be run apart here ({said}); user namespaces must be allowed, and one of "
            f"{', '.join(_INTERPRETERS)} readable by all"
        )

    def _check_network(self) -> None:
        """A program must not reach a port that listens here."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            reached = self.run(_CONNECT.format(port=server.getsockname()[1]))
        if reached.outcome is Outcome.PASSED:
            raise ExecutionError("a program could reach the network in spite of unshare --net; it is not run")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Probability that one of k of the samples passes, unbiased: 1 - C(n - c, k) / C(n, k).

    Chen et al., Evaluating Large Language Models Trained on Code (2021), equation 1. Raises ValueError where
    k samples are not there.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 to {num_samples} samples of a problem; draw {k} of each")
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)
