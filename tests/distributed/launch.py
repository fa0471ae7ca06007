"""Starts the processes of a run on gloo: forked from a zygote, or by torchrun as users do (seconds more)."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.distributed.zygote import MODULE

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120.0


def write_recipe(folder: Path, recipe: dict[str, Any], name: str) -> Path:
    """The recipe as a file, its run folder under `folder`."""
    tree = copy.deepcopy(recipe)
    tree["run"] |= {"name": name, "output_dir": str(folder / "runs")}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def environment() -> dict[str, str]:
    """Of every process of a run."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    fixed = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}


class Job:
    """A run that was started: its processes, in the order of their ranks, and what they print."""

    def __init__(self, request: dict[str, Any], first: str = "") -> None:
        zygote = _zygote(first)
        descriptor, name = tempfile.mkstemp(prefix="job-", suffix=".log", dir=zygote)
        os.close(descriptor)
        self.log = Path(name)
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(zygote / "socket"))
        self._connection.sendall(json.dumps(request | {"log": name}).encode() + b"\n")
        self._received = b""
        self.pids: list[int] = self._read("pids", TIMEOUT_SECONDS)
        self.codes: list[int] | None = None

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> list[int]:
        """The exit codes, by rank. Fails with the output after `timeout` seconds."""
        if self.codes is None:
            self.codes = self._read("codes", timeout)
        return self.codes

    def assert_ends(self, status: int) -> None:
        """All end with this status, but for those that the launcher ended because another was faster."""
        codes = set(self.wait())
        assert status in codes, f"{self.codes}\n{self.output()[-8000:]}"
        assert codes <= {status, -signal.SIGTERM}, f"{self.codes}\n{self.output()[-8000:]}"

    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT_SECONDS) -> None:
        """Returns once the condition holds; fails with the output where the run ends or time runs out."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert not self.ended, self.output()
            assert time.monotonic() < deadline, f"waited {timeout} s for nothing:\n{self.output()}"
            time.sleep(0.005)

    @property
    def ended(self) -> bool:
        return self.codes is not None or bool(self._received) or self._is_readable(0)

    def signal(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """To all processes, or to those of `ranks`."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Ends what is left of it."""
        self._connection.close()

    def _read(self, name: str, timeout: float) -> list[int]:
        while b"\n" not in self._received:
            assert self._is_readable(timeout), f"no {name} in {timeout} s:\n{self.output()}"
            received = self._connection.recv(65536)
            assert received, f"the supervisor is gone:\n{self.output()}"
            self._received += received
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)[name]

    def _is_readable(self, timeout: float) -> bool:
        return bool(select.select([self._connection], [], [], timeout)[0])


@contextmanager
def started(
    num_processes: int,
    verb: str,
    recipe: Path,
    arguments: Sequence[str] = (),
    program: str | Path = MODULE,
    first: str = "",
) -> Iterator[Job]:
    """A run in the background; nothing of it is left behind the block.

    first: a module that every process has imported before Megatron.
    """
    with _started(num_processes, program, [verb, str(recipe), *arguments], first) as job:
        yield job


@contextmanager
def _started(
    num_processes: int, program: str | Path, arguments: Sequence[str], first: str = ""
) -> Iterator[Job]:
    job = Job(
        {
            "num_processes": num_processes,
            "program": str(program),
            "arguments": arguments,
            "environment": environment(),
            "folder": os.getcwd(),
        },
        first,
    )
    try:
        yield job
    finally:
        job.close()


def launch(
    num_processes: int,
    verb: str,
    recipe: Path,
    arguments: Sequence[str] = (),
    program: str | Path = MODULE,
    status: int = 0,
    first: str = "",
) -> str:
    """Runs to the end and returns what was printed; fails with it where a process ends otherwise."""
    with started(num_processes, verb, recipe, arguments, program, first) as job:
        job.assert_ends(status)
        return job.output()


def launch_program(num_processes: int, program: str | Path) -> str:
    """The same for a program that makes its process group itself, of the environment that torchrun sets."""
    with _started(num_processes, program, []) as job:
        job.assert_ends(0)
        return job.output()


@functools.cache
def _zygote(first: str) -> Path:
    """The folder of the zygote that serves this test process, started on first use; one for each `first`."""
    folder = Path(tempfile.mkdtemp(prefix="zygote-"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.zygote", str(folder / "socket"), *filter(None, [first])],
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def end() -> None:
        process.communicate(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", "the zygote did not start; its error is above"
    return folder


def torchrun(num_processes: int, verb: str, recipe: Path, *arguments: str) -> list[str]:
    """The command that a user types."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [
        *launcher,
        "--nproc-per-node",
        str(num_processes),
        "-m",
        "xdlm_megatron",
        verb,
        str(recipe),
        *arguments,
    ]


@contextmanager
def started_by_torchrun(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The launcher; it and its ranks (each in a session of its own) are ended with the block."""
    process = subprocess.Popen(
        command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            launcher = psutil.Process(process.pid)
            for each in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait(10)


def last_step(metrics: Path) -> int:
    """The newest whole line's step, 0 before there is one."""
    if not metrics.exists():
        return 0
    lines = metrics.read_bytes().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def read_series(metrics: Path, name: str) -> list[float]:
    """One metric over the steps that logged it."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line[name] for line in lines if name in line]
