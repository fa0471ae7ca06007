"""Starts a training run the way users do: torchrun and the command line, on gloo."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

TIMEOUT_SECONDS = 240


def write_recipe(folder: Path, recipe: dict[str, Any], name: str) -> Path:
    """The recipe as a file, its run folder under `folder`."""
    tree = copy.deepcopy(recipe)
    tree["run"] |= {"name": name, "output_dir": str(folder / "runs")}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(
    num_processes: int, verb: str, recipe: Path, arguments: Sequence[str], program: Sequence[str]
) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(num_processes),
        "--standalone",
    ]
    return [*launcher, *program, verb, str(recipe), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def launch(
    num_processes: int,
    verb: str,
    recipe: Path,
    arguments: Sequence[str] = (),
    program: Sequence[str] = ("-m", "xdlm_megatron"),
) -> str:
    """Runs to the end and returns what was printed; fails with it where the exit status is not 0."""
    done = subprocess.run(
        command(num_processes, verb, recipe, arguments, program),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def launch_and_kill(
    num_processes: int,
    recipe: Path,
    arguments: Sequence[str],
    metrics: Path,
    after_step: int,
    how: signal.Signals,
) -> str:
    """Starts training and sends `how` to every process once `after_step` is logged; returns the output."""
    process = subprocess.Popen(
        command(num_processes, "train", recipe, arguments, ("-m", "xdlm_megatron")),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while last_step(metrics) < after_step:
            assert process.poll() is None, process.communicate()[0][-6000:]
            assert time.monotonic() < deadline, "the run did not get to the step in time"
            time.sleep(0.02)
        if how is signal.SIGKILL:
            kill_tree(process.pid)
        else:
            process.send_signal(how)  # torchrun passes it on, as under Slurm
        return process.communicate(timeout=TIMEOUT_SECONDS)[0]
    finally:
        if process.poll() is None:
            kill_tree(process.pid)


def kill_tree(pid: int) -> None:
    """kill -9 for the launcher, the ranks (each in a session of its own) and their children."""
    launcher = psutil.Process(pid)
    for process in [*launcher.children(recursive=True), launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


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
