"""`sbatch slurm/pretrain_1b.sh` on a real Slurm: two nodes, requeues, a lost node, exit codes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import last_step, read_series
from tests.distributed.same import assert_same_tensors
from tests.slurm.mini_slurm import MiniSlurm

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).parents[2]
SECONDS = 600  # until a machine with much else to do gets there
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")
NUM_STEPS = 60
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=60")
TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.ffn_hidden_size": 64,
    "model.num_attention_heads": 4,
    "parallel.tensor_model_parallel_size": 2,
    "precision.dtype": "float32",
    "optimizer.ema_decay": 0.9,
    "lr_schedule.warmup_steps": 2,
    "train.num_steps": NUM_STEPS,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
    "train.log_interval": 1,
    "checkpoint.save_interval": 10,
    "checkpoint.keep_every": "null",
    "evaluation.interval": 20,
    "evaluation.num_sequences": 8,
}


class Jobs:
    """Submits the script with a tiny recipe; each job has a run folder and a log."""

    def __init__(self, slurm: MiniSlurm, data: dict[str, object], folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.fields = {**TINY, **{f"data.{name}": value for name, value in data.items()}}

    def submit(self, name: str, **changes: object) -> str:
        fields = {**self.fields, "run.name": name, "run.output_dir": self.folder / "runs", **changes}
        overrides = [f"{field}={value}" for field, value in fields.items()]
        environment = f"--export=ALL,OMP_NUM_THREADS=1,XDLM_HOME={REPOSITORY},XDLM_PYTHON={sys.executable}"
        environment += f",XDLM_CHECK={int(name == 'whole')}"  # seconds of importing torch at every start
        log = f"--output={self.folder}/{name}.out"
        script = str(REPOSITORY / "slurm/pretrain_1b.sh")
        return self.slurm.run("sbatch", "--parsable", *SIZE, environment, log, script, *overrides).strip()

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def end(self, job_id: str, name: str, state: str = "COMPLETED") -> dict[str, str]:
        """Waits for the job's end and checks its state."""
        job = self.slurm.wait(job_id, lambda job: job["JobState"] in ENDED, SECONDS)
        assert job["JobState"] == state, self.log(name)[-6000:]
        return job

    def wait_for_step(self, job_id: str, name: str, step: int) -> None:
        deadline = time.monotonic() + SECONDS
        while last_step(self.run_folder(name) / "metrics.jsonl") < step:
            job = self.slurm.job(job_id)
            assert job["JobState"] in ("PENDING", "RUNNING"), self.log(name)[-6000:]
            assert time.monotonic() < deadline, self.log(name)[-6000:]
            time.sleep(0.05)

    def wait_for_line(self, name: str, text: str) -> None:
        deadline = time.monotonic() + SECONDS
        while text not in self.log(name):
            assert time.monotonic() < deadline, self.log(name)[-6000:]
            time.sleep(0.2)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """The run's processes stand still inside the block, so that it does not end before it is asked to."""
        ours = [process for process in psutil.process_iter(["cmdline"]) if _trains(process, name)]
        for process in ours:
            process.suspend()
        try:
            yield
        finally:
            for process in ours:
                process.resume()


def _trains(process: psutil.Process, name: str) -> bool:
    command = process.info["cmdline"] or [""]
    return "python" in Path(command[0]).name and f"run.name={name}" in command


@pytest.fixture(scope="module")
def jobs(slurm: MiniSlurm, tiny_data: dict, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(slurm, tiny_data, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def whole(jobs: Jobs) -> Path:
    """The run folder of a job that nothing interrupted."""
    jobs.end(jobs.submit("whole"), "whole")
    return jobs.run_folder("whole")


def assert_went_on(run: Path, whole: Path) -> None:
    """Every step once, with the very losses and weights of the uninterrupted job, in one MLflow run."""
    from mlflow.tracking import MlflowClient

    for metric in ("step", "train/nelbo", "train/grad_norm", "eval/valid/nelbo_per_token"):
        assert read_series(run / "metrics.jsonl", metric) == read_series(whole / "metrics.jsonl", metric)
    last = f"checkpoints/step_{NUM_STEPS:08d}"
    assert_same_tensors(run / last, whole / last)
    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("xdlm")
    (logged,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run.name}'")
    points = {point.step for point in client.get_metric_history(logged.info.run_id, "train/nelbo")}
    assert points == set(range(1, NUM_STEPS + 1))
    assert logged.info.status == "FINISHED"


def test_two_nodes_train_one_model(jobs: Jobs, whole: Path) -> None:
    log = jobs.log("whole")
    assert "2 processes on node[1-2]" in log
    assert "2 processes on node1, node2: good" in log, "the check before the launch"
    assert "layout: tensor 2 x pipeline 1 x context 1 x data 1" in log
    assert f"finished at step {NUM_STEPS}" in log
    assert len(read_series(whole / "metrics.jsonl", "train/nelbo")) == NUM_STEPS


def test_the_time_limit_saves_requeues_and_goes_on(jobs: Jobs, whole: Path) -> None:
    """The script asks for a signal 10 minutes before the limit; Slurm looks every 30 s whether it is time."""
    job_id = jobs.submit("limited")
    jobs.wait_for_step(job_id, "limited", 13)
    with jobs.frozen("limited"):
        jobs.slurm.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=5")
        jobs.wait_for_line("limited", "asked to save and be requeued")
        jobs.slurm.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=60")
    assert jobs.end(job_id, "limited")["Restarts"] == "1"
    log = jobs.log("limited")
    assert "requeue at step" in log
    assert "resumes at step" in log, "the log of the first start is kept, the second goes on"
    assert_went_on(jobs.run_folder("limited"), whole)


def test_a_killed_node_requeues_and_goes_on(jobs: Jobs, whole: Path) -> None:
    """Its power is cut: the other process meets silence, Slurm misses the node; then it comes back."""
    job_id = jobs.submit("bereft")
    jobs.wait_for_step(job_id, "bereft", 23)
    jobs.slurm.kill_node("node2")
    jobs.slurm.wait(job_id, lambda job: job["JobState"] == "PENDING", SECONDS)
    jobs.slurm.start_node("node2")
    assert jobs.end(job_id, "bereft")["Restarts"] == "1"
    assert "resumes at step 2" in jobs.log("bereft"), "its last save"
    assert_went_on(jobs.run_folder("bereft"), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.num_stepz": 3}, "no such field; did you mean 'num_steps'?"),
        ({"parallel.tensor_model_parallel_size": 4}, "world size 2 must be a multiple of"),
        ({"data.train_prefix": "nowhere/text"}, "nowhere/text.json: no such manifest"),
    ],
    ids=["recipe", "layout", "data"],
)
def test_a_mistake_fails_with_its_line_and_status(
    jobs: Jobs, changes: dict[str, object], message: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    job = jobs.end(jobs.submit(name, **changes), name, state="FAILED")
    assert job["ExitCode"] == "2:0"
    assert job["Restarts"] == "0"
    log = jobs.log(name)
    assert message in log
    assert "Traceback" not in log


def test_submitting_again_goes_on_and_a_finished_run_stays(jobs: Jobs, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    jobs.end(jobs.submit("whole"), "whole")
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert f"resumes at step {NUM_STEPS}" in jobs.log("whole")
