"""sync_mlflow: a store gets what it lacks of any run folder, once; mistakes are one line."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scaling.test_collect import make_run
from xdlm_megatron.tracking import mlflow as tracking_mlflow
from xdlm_megatron.tracking.mlflow import MlflowTracker
from xdlm_megatron.tracking.shipping import SHIPPED_FILE, read_json, ship
from xdlm_megatron.tracking.store import connect

TOOL = Path(__file__).parents[3] / "tools/sync_mlflow.py"
LOSSES = {5: 3.5, 10: 3.25}
START = {"step": 0, "world_size": 4, "git_commit": "abc", "slurm_job_id": "17"}
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("sync_mlflow", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sync(tool: Any, store_uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, on the shared store unless told otherwise; its status."""

    def run(*folders: Path, to: str = store_uri) -> int:
        monkeypatch.setattr(sys, "argv", ["sync_mlflow.py", *map(str, folders), "--to", to])
        return tool.main()

    return run


def offline_run(folder: Path, experiment: str, outcome: str = "finished at step 10", **tracking: str) -> Path:
    """A run folder as training leaves it on a machine without a network (tracking.mlflow: null)."""
    make_run(folder, LOSSES, tracking={"mlflow": None, "experiment": experiment, **tracking})
    (folder / "environment.jsonl").write_text(json.dumps(START | {"parallel": LAYOUT}) + "\n")
    (folder / "figures").mkdir()
    (folder / "figures/loss.svg").write_text("<svg/>")
    if outcome:
        (folder / "outcome").write_text(outcome + "\n")
    return folder


def runs_of(uri: str, experiment: str) -> tuple[Any, list[Any]]:
    client = connect(uri)
    return client, list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def steps_of(client: Any, run: Any, name: str = "train/nelbo") -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, name))


def test_an_offline_run_is_sent_once(
    tmp_path: Path, sync: Any, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = offline_run(tmp_path / "a", "offline")
    assert sync(folder) == 0
    assert "12 points sent, FINISHED" in capsys.readouterr().out
    copy = shutil.copytree(folder, tmp_path / "copy")  # as on another machine, before anything was sent
    for path in copy.glob("mlflow*"):
        path.unlink()
    assert sync(tmp_path) == 0
    assert capsys.readouterr().out.count(": 0 points sent, FINISHED") == 2
    client, (run,) = runs_of(store_uri, "offline")
    assert steps_of(client, run) == list(range(1, 11))
    assert steps_of(client, run, "eval/valid/nelbo_per_token") == [5, 10]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert run.data.params["train.num_steps"] == "10"
    assert float(run.data.params["total_flops"]) > 6 * int(run.data.params["num_parameters"])
    tags = {name: run.data.tags[name] for name in ("git_commit", "layout", "slurm_job_id")}
    assert tags == {"git_commit": "abc", "layout": "tp2-pp1-cp1-dp2", "slurm_job_id": "17"}
    assert len(run.data.tags["recipe_hash"]) == 12
    files = {
        file.path for folder in ("", "figures") for file in client.list_artifacts(run.info.run_id, folder)
    }
    assert {"recipe.yaml", "environment.jsonl", "outcome", "figures/loss.svg"} <= files


@pytest.mark.parametrize("forgotten", [False, True], ids=["known", "found by its tag"])
def test_a_half_shipped_run_is_completed(
    tmp_path: Path, sync: Any, store_uri: str, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    monkeypatch.setattr(tracking_mlflow, "_start_process", lambda run_dir, poll_seconds: None)
    experiment = f"half {forgotten}"
    folder = offline_run(tmp_path / "a", experiment)
    MlflowTracker(folder, store_uri, experiment, "a")  # and its trainer is killed after half of the steps
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    ship(folder)
    run_id = read_json(folder / SHIPPED_FILE)["run_id"]
    (folder / "metrics.jsonl").write_bytes(whole)
    if forgotten:
        (folder / SHIPPED_FILE).unlink()
    assert sync(folder) == 0
    client, (run,) = runs_of(store_uri, experiment)
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    assert steps_of(client, run) == list(range(1, 11))


def test_a_sweep_that_was_offline_gets_its_parent(tmp_path: Path, sync: Any, store_uri: str) -> None:
    for name in ("a", "b"):
        offline_run(tmp_path / name, "sweep", parent_run="ladder")
    assert sync(tmp_path) == 0
    _, runs = runs_of(store_uri, "sweep")
    by_name = {run.info.run_name: run for run in runs}
    assert set(by_name) == {"a", "b", "ladder"}
    parents = {by_name[name].data.tags["mlflow.parentRunId"] for name in ("a", "b")}
    assert parents == {by_name["ladder"].info.run_id}


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("finished at step 10", "FINISHED"),
        ("requeue at step 4", "KILLED"),
        ("failed: step 3: no room", "FAILED"),
        ("", "KILLED"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, tool: Any, outcome: str, status: str) -> None:
    assert tool.status_of(offline_run(tmp_path / "a", "ends", outcome)) == status


def test_a_run_that_goes_on_is_left_running(tmp_path: Path, sync: Any, store_uri: str) -> None:
    folder = offline_run(tmp_path / "a", "goes on", outcome="")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sync(folder) == 0
    _, (run,) = runs_of(store_uri, "goes on")
    assert run.info.status == "RUNNING"
    (folder / "outcome").write_text("finished at step 10\n")
    assert sync(folder) == 0
    _, (run,) = runs_of(store_uri, "goes on")
    assert run.info.status == "FINISHED"


def test_one_bad_run_does_not_hold_up_the_others(
    tmp_path: Path, sync: Any, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    offline_run(tmp_path / "good", "bad and good")
    (offline_run(tmp_path / "bad", "bad and good") / "recipe.yaml").write_text("run: 3")
    (offline_run(tmp_path / "early", "bad and good") / "metrics.jsonl").unlink()
    assert sync(tmp_path) == 1
    said = capsys.readouterr().out
    assert "bad: not sent: ConfigError: " in said
    assert "early: nothing to send" in said
    assert "Traceback" not in said
    _, (run,) = runs_of(store_uri, "bad and good")
    assert run.info.run_name == "good"


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("mlruns", "use sqlite:///PATH/mlflow.db or http(s)://HOST"),
        ("http://127.0.0.1:1", "does not answer as an MLflow server"),
    ],
)
def test_a_wrong_address_is_one_line(
    tmp_path: Path, sync: Any, to: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync(offline_run(tmp_path / "a", "wrong"), to=to) == 2
    said = capsys.readouterr().err
    assert said.startswith("sync_mlflow: error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_path_without_a_run_is_one_line(
    tmp_path: Path, sync: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync(tmp_path / "none") == 2
    assert "neither a run folder nor a folder of them" in capsys.readouterr().err
