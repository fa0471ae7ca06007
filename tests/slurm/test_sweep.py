"""`python -m xdlm_megatron sweep` on a real Slurm: killed at every point, and nothing run twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.distributed.launch import last_step
from tests.slurm.mini_slurm import MiniSlurm
from xdlm_megatron.tracking.jsonl import read_metrics

pytestmark = pytest.mark.slurm
pytest.importorskip("submitit", reason="submitit is missing: pip install 'xdlm_megatron[slurm]'")

REPOSITORY = Path(__file__).parents[2]
SECONDS = 400
NUM_STEPS = 200


class Sweeps:
    """Sweeps of two sizes and three noises, whose runs take some seconds."""

    def __init__(self, slurm: MiniSlurm, data: dict[str, object], folder: Path) -> None:
        self.slurm, self.folder, self.data = slurm, folder, data
        self.environment = {**slurm.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}

    def write(self, name: str, **section: object) -> Path:
        small = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
        sweep = {
            "sizes": {"small": small, "large": small | {"num_layers": 2}},
            "design": {"kind": "tokens", "numbers": [NUM_STEPS * 8 * 32]},
            "axes": {"diffusion.uniform_ratio": [0, 0.1, 1]},
            "batch": "fixed",
            "lr": "fixed",
            "gpu": None,
            "max_jobs": 3,
            "hours": 1,
        }
        tree = {
            "run": {"name": name, "output_dir": str(self.folder)},
            "sweep": sweep | section,
            "data": self.data,
            "optimizer": {"lr": 1e-3, "ema_decay": 0},
            "lr_schedule": {"kind": "constant"},
            "train": {"micro_batch_size": 8, "global_batch_size": 8, "log_interval": 1},
            "checkpoint": {"save_interval": 20},
            "evaluation": {"num_sequences": 8},
            "tracking": {"mlflow": None},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def start(self, path: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "xdlm_megatron", "sweep", str(path), *options],
            cwd=REPOSITORY,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, path: Path, *options: str) -> str:
        out, err = self.start(path, *options).communicate(timeout=SECONDS)
        assert not err, err
        return out

    def queue(self, name: str) -> list[str]:
        """The states of the sweep's jobs."""
        lines = self.slurm.run("squeue", "--noheader", "--array", "--format=%j %T").splitlines()
        return [line.split()[1] for line in lines if line.startswith(f"{name}-")]

    def runs(self, name: str) -> list[Path]:
        return sorted(path.parent for path in (self.folder / name).glob("*/recipe.yaml"))

    def finished(self, name: str) -> list[Path]:
        outcomes = {run: run / "outcome" for run in self.runs(name)}
        return [r for r, path in outcomes.items() if path.exists() and "finished" in path.read_text()]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def starts(run: Path) -> list[int]:
    """The steps at which the run was started."""
    return [json.loads(line)["step"] for line in (run / "environment.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sweeps(
    slurm: MiniSlurm, tiny_data: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Sweeps:
    return Sweeps(slurm, tiny_data, tmp_path_factory.mktemp("sweeps"))


@pytest.fixture
def fatal_sbatch(tmp_path: Path) -> str:
    """A PATH whose sbatch submits, and then kills who called it, which so never learns the job's number."""
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    script = tmp_path / "sbatch"
    script.write_text(f'#!/bin/bash\n{real} "$@"\nkill -9 $PPID\n')
    script.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_killed_at_every_point_it_finishes_with_nothing_run_twice(sweeps: Sweeps, fatal_sbatch: str) -> None:
    path = sweeps.write("ladder")

    submitter = sweeps.start(path, PATH=fatal_sbatch)
    submitter.communicate(timeout=SECONDS)
    assert submitter.returncode == -9
    assert len(sweeps.queue("ladder")) == 6, "Slurm has what nobody noted"

    both = [sweeps.start(path) for _ in range(2)]
    outputs = [process.communicate(timeout=SECONDS) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("submitted 6 runs of 1 processes, 3 at a time" in out for out, _ in outputs) == 1, outputs
    wait_until(lambda: len(sweeps.queue("ladder")) <= 6, "the first array is cancelled")
    wait_until(lambda: len(sweeps.finished("ladder")) >= 2, "some runs finish")
    assert Counter(sweeps.queue("ladder"))["RUNNING"] <= 3

    sweeps.slurm.run("scancel", "--user=root")
    wait_until(lambda: not sweeps.queue("ladder"), "the queue is empty")
    before = {run: (run / "metrics.jsonl").read_bytes() for run in sweeps.finished("ladder")}
    assert 2 <= len(before) < 6
    status = sweeps.run(path, "--status")
    assert f"{len(before)} finished" in status

    assert f"submitted {6 - len(before)} runs" in sweeps.run(path)
    wait_until(lambda: len(sweeps.finished("ladder")) == 6, "all runs finish")
    wait_until(lambda: not sweeps.queue("ladder"), "the queue is empty")
    assert "submitted" not in sweeps.run(path)
    assert "6 runs: 6 finished; 100.0% of" in sweeps.run(path, "--status")

    for run in sweeps.runs("ladder"):
        steps = [r["step"] for r in read_metrics(run / "metrics.jsonl") if "train/nelbo" in r]
        assert steps == list(range(1, NUM_STEPS + 1)), run
        assert not (run / "metrics.jsonl.superseded").exists(), "it went on where it had stopped"
        assert starts(run) == sorted(set(starts(run))), "no start began where another had"
    for run, metrics in before.items():
        assert len(starts(run)) == 1, "what was finished is not started again"
        assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_mistake_ends_the_job_with_its_status_and_line(sweeps: Sweeps) -> None:
    path = sweeps.write("mistaken", axes={})
    tree = yaml.safe_load(path.read_text())
    tree["data"] = {**tree["data"], "train_prefix": "nowhere/text"}
    path.write_text(yaml.safe_dump(tree))
    job = sweeps.run(path).split("job ")[1].split()[0]
    ended = [
        sweeps.slurm.wait(f"{job}_{index}", lambda job: job["JobState"] == "FAILED", SECONDS)
        for index in range(2)
    ]
    assert {record["ExitCode"] for record in ended} == {"2:0"}
    status = sweeps.run(path, "--status")
    assert "mistaken: 2 runs: 2 failed" in status
    assert "status 2, see " in status
    log = next((sweeps.folder / "mistaken/sweep/logs").iterdir()).read_text()
    assert "nowhere/text.json: no such manifest" in log
    assert "Traceback" not in log


def test_what_sbatch_refuses_is_a_line(sweeps: Sweeps) -> None:
    path = sweeps.write("refused", axes={}, sbatch={"partition": "none"})
    process = sweeps.start(path)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: sbatch refuses: ")
    assert "Invalid partition name" in last
    assert "Traceback" not in err
    assert "2 missing" in sweeps.run(path, "--status")


def test_the_signal_before_the_limit_saves_requeues_and_goes_on(sweeps: Sweeps) -> None:
    small = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
    path = sweeps.write("limited", sizes={"small": small}, axes={})
    job = sweeps.run(path).split("job ")[1].split()[0]
    wait_until(lambda: any(last_step(run / "metrics.jsonl") > 5 for run in sweeps.runs("limited")), "steps")
    sweeps.slurm.run("scancel", "--batch", "--signal=USR2", job)
    ended = sweeps.slurm.wait(job, lambda record: record["JobState"] == "COMPLETED", SECONDS)
    assert ended["Restarts"] == "1"
    (run,) = sweeps.finished("limited")
    steps = [r["step"] for r in read_metrics(run / "metrics.jsonl") if "train/nelbo" in r]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert len(starts(run)) == 2
