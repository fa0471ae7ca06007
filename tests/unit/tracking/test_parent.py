"""One parent run a sweep, however many of its runs start at the same moment."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from xdlm_megatron.tracking import mlflow as tracking_mlflow
from xdlm_megatron.tracking import parent
from xdlm_megatron.tracking.jsonl import JsonlTracker
from xdlm_megatron.tracking.mlflow import MlflowTracker
from xdlm_megatron.tracking.parent import find_or_create_parent, log_to_parent
from xdlm_megatron.tracking.shipping import SHIPPED_FILE, read_json, ship
from xdlm_megatron.tracking.store import open_experiment


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers without a process: the test ships by hand."""
    monkeypatch.setattr(tracking_mlflow, "_start_process", lambda run_dir, poll_seconds: None)


def make_child(folder: Path, uri: str, experiment: str, parent_run: str | None = "ladder") -> Path:
    tracker = MlflowTracker(folder, uri, experiment, folder.name, parent_run=parent_run)
    metrics = JsonlTracker(folder / "metrics.jsonl")
    metrics.log(1, {"train/nelbo": 3.0})
    metrics.close("FINISHED")
    tracker.close("FINISHED")
    return folder


class AllAtOnce:
    """A client that waits for everybody after its first search and after its first candidate."""

    def __init__(self, client: Any, everybody: threading.Barrier) -> None:
        self._client, self._everybody = client, everybody
        self._waits_at = {"search_runs", "create_run"}

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            answer = getattr(self._client, name)(*arguments, **options)
            if name in self._waits_at:
                self._waits_at.remove(name)
                self._everybody.wait(120)
            return answer

        return call


def test_all_who_come_at_once_get_the_same_parent(store_uri: str) -> None:
    client, experiment_id = open_experiment(store_uri, "at once")
    everybody = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(
            lambda _: find_or_create_parent(AllAtOnce(client, everybody), experiment_id, "ladder"), range(4)
        )
        assert len(set(found)) == 1
    assert len(client.search_runs([experiment_id])) == 1


def test_a_candidate_whose_maker_died_is_removed(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, experiment_id = open_experiment(store_uri, "stale")
    dead = client.create_run(experiment_id, tags={parent.NAME_TAG: "ladder"}).info.run_id
    monkeypatch.setattr(parent, "STALE_SECONDS", 0.3)
    kept = find_or_create_parent(client, experiment_id, "ladder")
    assert kept != dead
    assert [run.info.run_id for run in client.search_runs([experiment_id])] == [kept]
    with pytest.raises(Exception, match="active"):  # its maker was only slow: it cannot keep it any more
        client.set_tag(dead, parent._STATE_TAG, parent._KEPT)


def test_runs_of_a_sweep_are_children_of_one_run(tmp_path: Path, store_uri: str) -> None:
    children = [make_child(tmp_path / name, store_uri, "family") for name in ("a", "b")]
    ship(make_child(tmp_path / "alone", store_uri, "family", parent_run=None))
    for child in children:
        ship(child)
    client, experiment_id = open_experiment(store_uri, "family")
    runs = {run.info.run_name: run for run in client.search_runs([experiment_id])}
    assert set(runs) == {"a", "b", "alone", "ladder"}
    ladder = runs["ladder"].info
    assert ladder.status == "FINISHED"
    for name in ("a", "b"):
        assert runs[name].data.tags["mlflow.parentRunId"] == ladder.run_id
    assert "mlflow.parentRunId" not in runs["alone"].data.tags


def test_a_parent_runs_as_long_as_a_child(tmp_path: Path, store_uri: str) -> None:
    def status() -> str:
        return client.get_run(read_json(tmp_path / "a" / SHIPPED_FILE)["parent_id"]).info.status

    first = MlflowTracker(tmp_path / "a", store_uri, "status", "a", parent_run="ladder")
    second = MlflowTracker(tmp_path / "b", store_uri, "status", "b", parent_run="ladder")
    ship(tmp_path / "a")
    ship(tmp_path / "b")
    client, _ = open_experiment(store_uri, "status")
    first.close("FAILED")
    ship(tmp_path / "a")
    assert status() == "RUNNING"
    second.close("FINISHED")
    ship(tmp_path / "b")
    assert status() == "FINISHED"
    MlflowTracker(tmp_path / "a", store_uri, "status", "a", parent_run="ladder")
    ship(tmp_path / "a", status="RUNNING")
    assert status() == "RUNNING"


def test_a_child_whose_parent_was_deleted_goes_on(tmp_path: Path, store_uri: str) -> None:
    tracker = MlflowTracker(tmp_path / "a", store_uri, "deleted", "a", parent_run="ladder")
    ship(tmp_path / "a")
    shipped = read_json(tmp_path / "a" / SHIPPED_FILE)
    client, _ = open_experiment(store_uri, "deleted")
    client.delete_run(shipped["parent_id"])
    tracker.close("FINISHED")
    ship(tmp_path / "a")
    assert client.get_run(shipped["run_id"]).info.status == "FINISHED"


def test_what_is_logged_to_the_parent_can_be_read_there(tmp_path: Path, store_uri: str) -> None:
    (tmp_path / "frontier.svg").write_text("<svg/>")
    ship(make_child(tmp_path / "a", store_uri, "figures"))
    for value in (0.3, 0.4):  # twice: a second fit of the same points
        run_id = log_to_parent(
            store_uri, "figures", "ladder", [tmp_path / "frontier.svg"], "fit", {"fit/alpha": value}, 4
        )
    assert run_id == read_json(tmp_path / "a" / SHIPPED_FILE)["parent_id"]
    client, _ = open_experiment(store_uri, "figures")
    assert [file.path for file in client.list_artifacts(run_id, "fit")] == ["fit/frontier.svg"]
    assert client.get_run(run_id).data.metrics == {"fit/alpha": 0.4}
