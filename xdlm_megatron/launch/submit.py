"""Runs of a sweep as Slurm array jobs, by submitit. A job's body is slurm/run_recipe.sh, as of any run.

What is submitted is noted before and after, in `FOLDER/sweep/submissions/ID.json`; ID is the job's name,
so Slurm itself tells which runs are queued or running. A note without a job id means that whoever submitted
was killed in between: that job is cancelled before its runs are submitted again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import types
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdlm_megatron.launch.attempt import DONE, TAKEN, Attempt, SweepFolder
from xdlm_megatron.launch.progress import is_finished
from xdlm_megatron.tracking.store import locked

BODY = Path("slurm/run_recipe.sh")
SIGNAL_SECONDS = 600  # between the signal to save and the time limit, as in slurm/pretrain_*.sh
# Asking how a run stands takes its claim for an instant; a file server holds a lost node's for longer.
CLAIM_SECONDS = 120.0
LARGEST_ARRAY = 1000  # Slurm's MaxArraySize is 1001 unless the site has changed it


class SubmitError(ValueError):
    """Slurm cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Resources:
    """Of each job of an array. options: further ones of sbatch."""

    nodes: int
    tasks_per_node: int
    gpus: bool
    minutes: int
    options: tuple[tuple[str, Any], ...]

    def parameters(self) -> dict[str, Any]:
        """As submitit takes them; the signal goes to the batch process, which passes it on."""
        lead = min(SIGNAL_SECONDS, 20 * self.minutes)  # a third of a short limit
        extra = {"signal": f"B:USR2@{lead}", "requeue": True} | dict(self.options)
        parameters: dict[str, Any] = {
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "time": self.minutes,
            "use_srun": False,
            "stderr_to_stdout": True,
            "additional_parameters": extra,
        }
        return parameters | ({"gpus_per_node": self.tasks_per_node} if self.gpus else {})


@dataclass(frozen=True)
class Submission:
    """What one note says. id: the job's name; job: its number, None until submitit has returned."""

    id: str
    job: str | None
    runs: Sequence[str]


def active_runs(folder: SweepFolder) -> dict[str, str]:
    """Runs that Slurm has queued or is running -> its word for that. Raises SubmitError without an answer."""
    known = {submission.id: submission for submission in _submissions(folder)}
    if not known:
        return {}
    active = {}
    for line in _slurm("squeue", "--noheader", "--array", "--format=%j %K %T", "--name", ",".join(known)):
        name, index, state = line.split()
        runs = known[name].runs
        active[runs[int(index) if index.isdigit() else 0]] = state
    return active


@contextmanager
def submitting(folder: SweepFolder) -> Iterator[None]:
    """One at a time decides what is missing and submits it. Cancels jobs of whoever was killed at that."""
    with locked(folder.own / "submit.lock"):
        for submission in _submissions(folder):
            if submission.job is None:
                _slurm("scancel", "--full", "--name", submission.id)
                _note(folder, submission).unlink()
        yield


def submit(folder: SweepFolder, runs: Sequence[str], resources: Resources, max_jobs: int) -> list[str]:
    """Submits the runs, at most `max_jobs` at a time; returns the ids of the array jobs. In `submitting`."""
    submitit = _import_submitit()
    if shutil.which("srun") is None:
        raise SubmitError("srun: no such program; is this a Slurm cluster? --local N runs here")
    if not BODY.exists():
        raise SubmitError(f"{BODY} is not here; call sweep from the root of the repository")
    jobs = []
    for first in range(0, len(runs), LARGEST_ARRAY):
        part = runs[first : first + LARGEST_ARRAY]
        submission = Submission(f"{folder.folder.name}-{uuid.uuid4().hex[:12]}", None, part)
        _save(folder, submission)
        executor = submitit.SlurmExecutor(
            folder=folder.own / "slurm",
            python=f"exec {shlex.quote(sys.executable)}",  # the signal is for it, not for a shell around it
        )
        executor.update_parameters(
            **resources.parameters(), job_name=submission.id, array_parallelism=max_jobs
        )
        try:
            array = executor.map_array(run_in_job, [str(folder.folder)] * len(part), list(part))
        except (
            submitit.core.utils.FailedJobError
        ) as error:  # sbatch refuses: an unknown partition, account, ...
            _note(folder, submission).unlink()
            raise SubmitError(f"sbatch refuses: {str(error).splitlines()[-1]}") from None
        job = array[0].job_id.split("_")[0]
        _save(folder, Submission(submission.id, job, part))
        jobs.append(job)
    return jobs


def run_in_job(folder: str, name: str) -> None:
    """What a job does: trains one run by slurm/run_recipe.sh, and ends with its exit status."""
    sweep = SweepFolder(Path(folder))
    ours = (
        {} if os.environ.get("XDLM_CONTAINER") else {"XDLM_PYTHON": sys.executable}
    )  # a container has its own
    command = [str(BODY), str(sweep.recipe(name))]
    attempt = Attempt(sweep, name, lambda: command, ours | dict(os.environ), CLAIM_SECONDS)
    asked: list[int] = []

    def pass_on(number: int, frame: types.FrameType | None) -> None:
        asked.append(number)
        attempt.stop(signal.SIGTERM if number == signal.SIGTERM else signal.SIGUSR1)

    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, pass_on)
    print(f"{name}: trains, and writes to {sweep.log(name)}", flush=True)
    status = attempt()
    if status == TAKEN and asked and not is_finished(sweep.run(name)):
        print(f"{name}: asked to end while another process had it", flush=True)
        if signal.SIGTERM not in asked:  # the body, which requeues a job that trains, has not begun
            _slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    elif status == TAKEN:
        print(f"{name}: finished before, or another process trains it", flush=True)
    elif status != DONE:
        print(f"{name}: ended with status {status}; see {sweep.log(name)}", flush=True)
        sys.exit(status)


def _import_submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise SubmitError(
            "Slurm sweeps need submitit; pip install 'xdlm_megatron[slurm]', or add --local N to run here"
        ) from None
    return submitit


def _submissions(folder: SweepFolder) -> list[Submission]:
    notes = sorted((folder.own / "submissions").glob("*.json"))
    return [Submission(note.stem, **json.loads(note.read_text(encoding="utf-8"))) for note in notes]


def _note(folder: SweepFolder, submission: Submission) -> Path:
    return folder.own / "submissions" / f"{submission.id}.json"


def _save(folder: SweepFolder, submission: Submission) -> None:
    """Whole or not at all, and on the disk before sbatch is called."""
    note = _note(folder, submission)
    note.parent.mkdir(parents=True, exist_ok=True)
    aside = note.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump({"job": submission.job, "runs": list(submission.runs)}, file)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(note)


def _slurm(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise SubmitError(
            f"{command[0]}: no such program; is this a Slurm cluster? --local N runs here"
        ) from None
    except subprocess.TimeoutExpired:
        raise SubmitError(f"{command[0]}: no answer in 120 s; try again when Slurm answers") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise SubmitError(f"{command[0]}: {said}; try again when Slurm answers")
    return done.stdout.splitlines()


def share(max_jobs: int, sizes: Mapping[Any, int]) -> dict[Any, int]:
    """Jobs at a time for each of several arrays, by their numbers of runs: max_jobs in all, but one each."""
    total = sum(sizes.values())
    return {key: max(1, max_jobs * size // total) for key, size in sizes.items()}
