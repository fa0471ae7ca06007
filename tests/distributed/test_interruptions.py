"""Signals, lost processes, full disks, trackers that are down, loss spikes: what a job of several does."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import (
    TIMEOUT_SECONDS,
    last_step,
    launch,
    read_series,
    started,
    started_by_torchrun,
    torchrun,
    write_recipe,
)
from tests.distributed.layouts import CP2, PP2, TP2
from tests.distributed.mlflow_stand_in import mlflow_stand_in
from xdlm_megatron.__main__ import ExitStatus
from xdlm_megatron.checkpoint.integrity import find_damage

pytestmark = pytest.mark.distributed

FAILING = Path(__file__).with_name("failing_main.py")


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict) -> dict:
    return {
        **tiny_recipe,
        "model": {**tiny_recipe["model"], "num_layers": 2},
        "train": {**tiny_recipe["train"], "num_steps": 100_000},
        "checkpoint": {"save_interval": 1000},
        "evaluation": {"interval": 100_000, "num_sequences": 8},
    }


def ends_well(run: Path, outcome: str, output: str) -> int:
    """Checks what a stopped run leaves; returns its step."""
    last = last_step(run / "metrics.jsonl")
    assert (run / "outcome").read_text() == f"{outcome} at step {last}\n"
    assert f"{outcome} at step {last}" in output
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{last:08d}"
    assert find_damage(run / f"checkpoints/step_{last:08d}") is None
    return last


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_and_stops_all(
    number: signal.Signals, recipe: dict, tmp_path: Path
) -> None:
    requeue = number in (signal.SIGUSR1, signal.SIGUSR2)
    path, run = write_recipe(tmp_path, recipe, "stopped"), tmp_path / "runs/stopped"
    # An asynchronous save of every step is in flight when the signal comes.
    options = ["checkpoint.async_save=true", "checkpoint.save_interval=1"]
    with started(2, "train", path, options) as job:
        job.wait_until(lambda: last_step(run / "metrics.jsonl") >= 2)
        job.signal(number, [1])
        if requeue:
            job.signal(signal.SIGTERM, [0])  # schedulers send it in the end; the wish to be requeued stays
        status = ExitStatus.REQUEUE if requeue else ExitStatus.DONE
        job.assert_ends(status)
        last = ends_well(run, "requeue" if requeue else "stopped", job.output())
    output = launch(2, "train", path, ["--resume", f"train.stop_after_step={last + 1}"])
    assert f"resumes at step {last}" in output
    assert ends_well(run, "stopped", output) == last + 1


@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGTERM, "stopped"), (signal.SIGUSR1, "requeue")])
def test_a_signal_to_torchrun(number: signal.Signals, outcome: str, recipe: dict, tmp_path: Path) -> None:
    """As under Slurm: the launcher passes it on."""
    path, run = write_recipe(tmp_path, recipe, "stopped"), tmp_path / "runs/stopped"
    command = torchrun(2, "train", path, TP2)
    command[3:3] = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2"]
    with started_by_torchrun(command) as process:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while last_step(run / "metrics.jsonl") < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        output = process.communicate(timeout=TIMEOUT_SECONDS)[0]
    ends_well(run, outcome, output)


@pytest.mark.parametrize(("lost", "layout"), [(0, []), (1, [TP2]), (0, [PP2]), (1, [CP2])])
def test_a_process_that_stands_still_ends_the_job(
    lost: int, layout: list[str], recipe: dict, tmp_path: Path
) -> None:
    """Within the bound, with one line that says where, and no traceback."""
    path, run = write_recipe(tmp_path, recipe, "lost"), tmp_path / "runs/lost"
    bound = 10.0
    options = [*layout, f"parallel.distributed_timeout_minutes={bound / 60}", "train.stop_after_step=99999"]
    with started(2, "train", path, options) as job:
        job.wait_until(lambda: last_step(run / "metrics.jsonl") >= 2)
        job.signal(signal.SIGSTOP, [lost])
        begin = time.monotonic()
        job.wait_until(lambda: "error: " in job.output(), timeout=60)
        assert bound / 2 < time.monotonic() - begin < 3 * bound
        job.signal(signal.SIGKILL, [lost])
        codes = job.wait()
        output = job.output()
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == ExitStatus.FAILED, output
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert "another process has died or does not answer" in line
    assert line.index("step ") < line.index("another process")
    assert "--resume" in line
    assert "Traceback" not in output
    assert (run / "outcome").read_text().startswith("lost: step ")


FULL = {
    "a file of a checkpoint": 1,
    "the folder of a checkpoint": 0,
    "the manifest": 0,
    "latest": 0,
    "a line of metrics": 0,
    "common.pt": 0,
    "metadata.json": 0,
}
TORN = "common.pt"  # torch writes it by itself, and does not say what the system said


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("what", FULL)
def test_a_full_disk(
    what: str, is_async: bool, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 4 on, or 6: one line, and the checkpoint before is whole and the latest."""
    path, run = write_recipe(tmp_path, recipe, "full"), tmp_path / "runs/full"
    step = 6 if is_async else 4  # a save in flight may fail instead of the next one
    monkeypatch.setenv("FAILURE", json.dumps({"what": what, "rank": FULL[what], "step": step}))
    options = [f"checkpoint.async_save={str(is_async).lower()}", "checkpoint.save_interval=2"]
    ends = [*options, "train.stop_after_step=9"]
    output = launch(2, "train", path, ends, FAILING, status=ExitStatus.FAILED)
    assert output.count("error: ") == 1, output
    reason = "a file could not be written whole" if what == TORN else "No space left on device"
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert reason in line
    assert "; make room or mend the disk, then go on by --resume" in line
    assert "Traceback" not in output
    assert (run / "outcome").read_text() == line.replace("error: ", "failed: ") + "\n"
    latest = (run / "checkpoints/latest").read_text().strip()
    assert latest in ("step_00000002", "step_00000004")[: 1 + is_async]
    assert find_damage(run / "checkpoints" / latest) is None
    output = launch(2, "train", path, [*options, "train.stop_after_step=7", "--resume"])
    assert f"resumes at step {int(latest[5:])}" in output
    assert read_series(run / "metrics.jsonl", "consumed_samples") == [8 * step for step in range(1, 8)]
    ends_well(run, "stopped", output)


@pytest.mark.parametrize("what", ["run.output_dir", "lock", "metrics.jsonl.superseded"])
def test_a_folder_that_cannot_be_written_to(what: str, recipe: dict, tmp_path: Path) -> None:
    """Found by the main process, the mistake of all: one line, and status 2 from each."""
    path, run = write_recipe(tmp_path, recipe, "shut"), tmp_path / "runs/shut"
    options = ["train.stop_after_step=3", "checkpoint.save_interval=1"]
    if what == "run.output_dir":
        (tmp_path / "file").touch()
        options.append(f"{what}={tmp_path / 'file'}")
        refused = f"{tmp_path / 'file/shut'}: Not a directory; "
    else:
        launch(2, "train", path, options)
        (run / "checkpoints/latest").write_text("step_00000002\n")
        (run / what).unlink(missing_ok=True)
        (run / what).mkdir()
        options.append("--resume")
        refused = f"{run / what}: Is a directory; "
    with started(2, "train", path, options) as job:
        assert job.wait() == [ExitStatus.USER_ERROR] * 2, job.output()
        output = job.output()
    (line,) = [line for line in output.splitlines() if "error: " in line]
    assert refused in line
    assert line.endswith("or choose another run.output_dir")
    assert "Traceback" not in output


def test_a_tracker_that_hangs_holds_nothing_up(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request is answered until the last step is done; then every point arrives."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with mlflow_stand_in(str(tmp_path / "artifacts")) as server:
        path, run = write_recipe(tmp_path, recipe, "hangs"), tmp_path / "runs/hangs"
        with started(2, "train", path, [f"tracking.mlflow={server.uri}", "train.num_steps=12"]) as job:
            job.wait_until(lambda: server.num_requests > 0 and last_step(run / "metrics.jsonl") == 12)
            assert server.num_answers == 0
            server.works.set()
            assert job.wait() == [0, 0], job.output()
            assert "MLflow is reached again; nothing was lost" in job.output()
        for name in ("train/nelbo", "train/grad_norm", "consumed_samples"):
            written = dict(enumerate(read_series(run / "metrics.jsonl", name), start=1))
            assert server.points[name] == pytest.approx(written)
            assert len(written) == 12
        assert server.status == "FINISHED"


@pytest.mark.parametrize("layout", [[], [TP2], [PP2], [CP2]], ids=["dp2", "tp2", "pp2", "cp2"])
def test_a_loss_spike_names_its_samples(
    layout: list[str], recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places 3 and 5 of step 24, whose first sample is 8 * 23, the same after a resume in between."""
    path, run = write_recipe(tmp_path, recipe, "spike"), tmp_path / "runs/spike"
    monkeypatch.setenv("FAILURE", json.dumps({"what": "spike", "rank": None, "step": 24}))
    launch(2, "train", path, [*layout, "train.stop_after_step=22"], FAILING)
    output = launch(2, "train", path, [*layout, "train.stop_after_step=26", "--resume"], FAILING)
    (line,) = (run / "spikes.jsonl").read_text().splitlines()
    spike = json.loads(line)
    assert spike["step"] == 24
    nelbo = read_series(run / "metrics.jsonl", "train/nelbo")
    assert spike["loss"] == nelbo[23] > spike["threshold"]
    before = sorted(nelbo[:23])
    assert spike["median"] == pytest.approx(before[11])
    deviations = sorted(abs(loss - before[11]) for loss in before)
    assert spike["threshold"] == pytest.approx(before[11] + 10 * 1.4826 * deviations[11])
    assert [sample["sample"] for sample in spike["worst"]][:2] == [8 * 23 + 5, 8 * 23 + 3]
    assert spike["worst"][1]["loss"] > 20 * spike["worst"][2]["loss"]
    assert output.count("step 24: loss ") == 1
    assert "is a spike" in output


@pytest.mark.parametrize(
    ("layout", "bad"), [([], math.nan), ([TP2], math.inf), ([PP2], math.nan)], ids=["dp2", "tp2", "pp2"]
)
def test_a_loss_that_is_not_finite_names_its_samples(
    layout: list[str], bad: float, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, though two steps tell little of what is normal; it spoils no later comparison."""
    path, run = write_recipe(tmp_path, recipe, "bad"), tmp_path / "runs/bad"
    monkeypatch.setenv("FAILURE", json.dumps({"what": "spike", "rank": None, "step": 3, "add": bad}))
    output = launch(2, "train", path, [*layout, "train.stop_after_step=5"], FAILING)
    (line,) = (run / "spikes.jsonl").read_text().splitlines()
    spike = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    text = "NaN" if math.isnan(bad) else "Infinity"
    assert (spike["step"], spike["loss"], spike["threshold"]) == (3, text, "NaN")
    assert spike["worst"][0] == {"sample": 8 * 2 + 5, "loss": text}
    assert spike["worst"][1]["sample"] == 8 * 2 + 3
    assert all(math.isfinite(sample["loss"]) for sample in spike["worst"][1:])
    assert output.count(f"step 3: the loss is {bad}; samples with the largest loss: 21 ({bad})") == 1
    nelbo = read_series(run / "metrics.jsonl", "train/nelbo")
    common = torch.load(run / "checkpoints/step_00000005/common.pt", weights_only=True)
    assert common["train_state"]["recent_losses"] == [*nelbo[:2], *nelbo[3:]]
