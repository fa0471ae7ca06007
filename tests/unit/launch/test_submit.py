"""What of Slurm sweeps needs no Slurm; tests/slurm/test_sweep.py has the rest."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from xdlm_megatron.launch import submit
from xdlm_megatron.launch.attempt import DONE, SweepFolder, take_claim
from xdlm_megatron.launch.submit import Resources, SubmitError, active_runs, share, submitting


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    sweep = SweepFolder(tmp_path / "ladder")
    sweep.make()
    return sweep


def note(folder: SweepFolder, name: str, job: str | None, runs: list[str]) -> Path:
    path = folder.own / f"submissions/{name}.json"
    path.write_text(json.dumps({"job": job, "runs": runs}))
    return path


def test_what_slurm_has_is_named_by_run(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    note(folder, "ladder-a", "7", ["x", "y", "z"])
    note(folder, "ladder-b", "8", ["single"])
    asked = []

    def squeue(*command: str) -> list[str]:
        asked.append(command)
        return ["ladder-a 1 RUNNING", "ladder-a 2 PENDING", "ladder-b N/A PENDING"]

    monkeypatch.setattr(submit, "_slurm", squeue)
    assert active_runs(folder) == {"y": "RUNNING", "z": "PENDING", "single": "PENDING"}
    assert asked[0][-2:] == ("--name", "ladder-a,ladder-b")


def test_without_submissions_slurm_is_not_asked(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_slurm", lambda *_: pytest.fail("asked"))
    assert active_runs(folder) == {}


def test_a_submission_that_was_cut_off_is_cancelled(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = note(folder, "ladder-a", None, ["x"]), note(folder, "ladder-b", "8", ["y"])
    called = []
    monkeypatch.setattr(submit, "_slurm", lambda *command: called.append(command) or [])
    with submitting(folder):
        pass
    assert called == [("scancel", "--full", "--name", "ladder-a")]
    assert not half.exists()
    assert whole.exists()


def test_no_slurm_is_told_in_a_line(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    note(folder, "ladder-a", "7", ["x"])
    monkeypatch.setenv("PATH", str(folder.folder))
    with pytest.raises(SubmitError, match=r"^squeue: no such program; .* --local N runs here$"):
        active_runs(folder)


def test_submitting_without_slurm_is_told_and_leaves_no_note(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note would make the next call, --local too, ask Slurm about it."""
    monkeypatch.setattr(submit, "_import_submitit", lambda: None)
    monkeypatch.setenv("PATH", str(folder.folder))
    with pytest.raises(SubmitError, match=r"^srun: no such program; .* --local N runs here$"):
        submit.submit(folder, ["x"], Resources(1, 1, False, 9, ()), 1)
    assert active_runs(folder) == {}


def test_a_job_trains_by_the_sweeps_interpreter_or_the_containers(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, str]] = []
    monkeypatch.setattr(submit, "Attempt", lambda *a: given.append(a[3]) or (lambda: DONE))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("XDLM_PYTHON", raising=False)
    monkeypatch.delenv("XDLM_CONTAINER", raising=False)
    submit.run_in_job(str(folder.folder), "x")
    monkeypatch.setenv("XDLM_CONTAINER", "xdlm.sif")
    submit.run_in_job(str(folder.folder), "x")
    monkeypatch.setenv("XDLM_PYTHON", "python3.12")
    submit.run_in_job(str(folder.folder), "x")
    assert [environment.get("XDLM_PYTHON") for environment in given] == [sys.executable, None, "python3.12"]


@pytest.mark.parametrize(
    ("number", "done"),
    [
        (signal.SIGUSR2, [("scontrol", "requeue", "71")]),  # ahead of the time limit
        (signal.SIGTERM, []),  # scancel, or a preemption, after which Slurm itself starts the job again
    ],
)
def test_a_job_asked_to_end_while_it_waits_for_its_run_is_requeued(
    number: signal.Signals, done: list, folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr(submit, "_slurm", lambda *command: called.append(command) or [])
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    claim = take_claim(folder.claim("x"))
    assert claim is not None
    signals = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    handlers = [signal.getsignal(caught) for caught in signals]
    threading.Timer(0.2, os.kill, [os.getpid(), number]).start()
    try:
        submit.run_in_job(str(folder.folder), "x")
    finally:
        for caught, handler in zip(signals, handlers, strict=True):
            signal.signal(caught, handler)
        os.close(claim)
    assert called == done
    assert not folder.attempts.exists(), "nothing was trained"


@pytest.mark.parametrize(
    ("max_jobs", "sizes", "caps"),
    [
        (16, {8: 30}, {8: 16}),
        (16, {1: 30, 8: 10}, {1: 12, 8: 4}),
        (2, {1: 9, 2: 1, 4: 1}, {1: 1, 2: 1, 4: 1}),
    ],
)
def test_arrays_share_the_cap(max_jobs: int, sizes: dict, caps: dict) -> None:
    assert share(max_jobs, sizes) == caps


def test_options_of_the_user_come_last() -> None:
    resources = Resources(2, 8, True, 60, (("signal", "B:USR2@30"), ("partition", "gpu")))
    parameters = resources.parameters()
    assert parameters["additional_parameters"] == {"signal": "B:USR2@30", "requeue": True, "partition": "gpu"}
    assert (parameters["nodes"], parameters["ntasks_per_node"], parameters["gpus_per_node"]) == (2, 8, 8)
    assert Resources(1, 1, False, 9, ()).parameters()["additional_parameters"]["signal"] == "B:USR2@180"
