"""`fit` puts what it finds in a sweep's runs on the sweep's parent run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.scaling.test_collect import make_run
from xdlm_megatron.__main__ import main
from xdlm_megatron.scaling.collect import collect_runs
from xdlm_megatron.scaling.to_mlflow import metrics_of
from xdlm_megatron.tracking.shipping import REQUEST_FILE, SHIPPED_FILE, write_json
from xdlm_megatron.tracking.store import open_experiment


def make_sweep(folder: Path, uri: str, experiment: str, parents: tuple[str | None, ...]) -> Path:
    """Finished runs whose trainers have asked for a store."""
    for index, parent in enumerate(parents):
        tracking = {"experiment": experiment, "parent_run": parent}
        run = make_run(folder / f"run{index}", {10: 3.0 + index}, tracking=tracking)
        write_json(run / REQUEST_FILE, {"uri": uri})
    return folder


def fit(runs: Path) -> int:
    return main(["fit", str(runs), "--output", str(runs / "../report"), "--draws", "20"])


def test_the_report_is_on_the_parent_run(
    tmp_path: Path, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client, experiment_id = open_experiment(store_uri, "fitted")
    runs = make_sweep(tmp_path / "runs", store_uri, "fitted", ("ladder", "ladder"))
    assert fit(runs) == 0
    assert "artifacts fit/ and metrics fit/... of run ladder" in capsys.readouterr().out
    (parent,) = client.search_runs([experiment_id])
    assert parent.info.run_name == "ladder"
    names = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id, "fit")}
    assert names == {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.html", "fit.json", "frontier.png", "frontier.svg"} <= names
    (point,) = client.get_metric_history(parent.info.run_id, "fit/num_points")
    assert (point.step, point.value) == (2, 2.0)


@pytest.mark.parametrize("parents", [("one", "two"), ("one", None), (None, None)])
def test_runs_of_no_one_sweep_go_nowhere(
    tmp_path: Path, parents: tuple[str | None, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(make_sweep(tmp_path / "runs", "http://127.0.0.1:1", "many", parents)) == 0
    assert "MLflow" not in capsys.readouterr().out


def test_a_store_that_is_away_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(make_sweep(tmp_path / "runs", "http://127.0.0.1:1", "away", ("ladder", "ladder"))) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not in MLflow (run ladder of experiment away in http://127.0.0.1:1): ")
    assert (tmp_path / "report/report.html").exists()


def test_runs_of_another_machine_make_no_store_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its path may mean nothing, or something else."""
    there = tmp_path / "there/mlflow.db"
    assert fit(make_sweep(tmp_path / "runs", f"sqlite:///{there}", "copied", ("ladder", "ladder"))) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        f"not in MLflow (run ladder of experiment copied in sqlite:///{there}): no such file"
    )
    assert not there.parent.exists()


def test_runs_that_were_sent_elsewhere_are_there(
    tmp_path: Path, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    open_experiment(store_uri, "moved")
    runs = make_sweep(tmp_path / "runs", "http://127.0.0.1:1", "moved", ("ladder", "ladder"))
    for run in runs.iterdir():
        write_json(run / SHIPPED_FILE, {"uri": store_uri})
    assert fit(runs) == 0
    assert f"of run ladder of experiment moved in {store_uri}" in capsys.readouterr().out.splitlines()[-1]


def test_a_damaged_note_costs_no_point(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", "http://127.0.0.1:1", "any", ("ladder", "ladder"))
    (runs / "run0" / REQUEST_FILE).write_text("{")
    collection = collect_runs([runs], "total")
    assert len(collection.points) == 2
    assert collection.notes[-1].startswith(f"{runs / 'run0'}: which MLflow run it is cannot be read (")


def test_every_estimate_is_a_metric() -> None:
    alpha = {"value": 0.35, "interval": [0.3, 0.4]}
    huber = {"coefficients": {"alpha": alpha, "beta": {"value": None}}, "n_opt_exponent": {"value": 0.5}}
    methods = {"huber": huber, "valleys": {"n_opt_exponent": None}}
    tree = {"num_points": 7, "series": [{"uniform_ratio": 0.1, "methods": methods}]}
    assert metrics_of(tree) == {
        "fit/num_points": 7,
        "fit/k0.1/huber/alpha": 0.35,
        "fit/k0.1/huber/n_opt_exponent": 0.5,
    }
