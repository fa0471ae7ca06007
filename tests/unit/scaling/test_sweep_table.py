"""`sweep --table`: finished runs as `fit --points` reads them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.unit.scaling.sweep_file import write_sweep
from xdlm_megatron.__main__ import main
from xdlm_megatron.config.load import dump_recipe
from xdlm_megatron.scaling.collect import collect_runs, collect_table
from xdlm_megatron.scaling.sweep import load_sweep

DESIGN = {"kind": "tokens", "numbers": [8192, 65536]}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a sweep whose runs have ended."""
    plan = load_sweep(write_sweep(tmp_path, design=DESIGN))
    for number, point in enumerate(plan.points):
        folder = plan.folder / point.name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(dump_recipe(point.config))
        last = {"step": point.config.train.num_steps, "eval/valid/nelbo_per_token": 3 + number / 7}
        last["eval/valid/nelbo_standard_error"] = 0.01
        (folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")
        (folder / "outcome").write_text("finished at the end\n")
    return plan.folder


def test_the_table_holds_what_fit_reads_from_the_runs(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = finished / "small-D8192-uniform_ratio0"
    (unfinished / "outcome").unlink()
    table = finished.parent / "points.csv"
    path = write_sweep(finished.parent, design=DESIGN)
    assert main(["sweep", str(path), "--table", str(table)]) == 0
    assert "7 of 8 runs" in capsys.readouterr().out
    (unfinished / "metrics.jsonl").unlink()
    rows, runs = collect_table(table).points, collect_runs([finished], "total").points
    by_name = {Path(point.run).name: point for point in runs}
    assert len(rows) == len(runs) == 7
    for row in rows:
        run = by_name[row.run]
        assert (row.params, row.tokens, row.uniform_ratio) == (run.params, run.tokens, run.uniform_ratio)
        assert row.loss == pytest.approx(run.loss, abs=1e-6)
        assert row.flops == pytest.approx(run.flops, rel=1e-5)


def test_what_a_run_lacks_stays_empty_or_is_said(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One was trained by a version without errors, one had a single held-out sequence, one had none."""

    def change(name: str, field: str, value: object) -> None:
        path = finished / name / "metrics.jsonl"
        record = {**json.loads(path.read_text()), field: value}
        path.write_text(json.dumps({key: kept for key, kept in record.items() if kept is not None}) + "\n")

    old, single, blind = sorted(path.name for path in finished.iterdir())[1:4]
    change(old, "eval/valid/nelbo_standard_error", None)
    change(single, "eval/valid/nelbo_standard_error", "NaN")
    change(blind, "eval/valid/nelbo_per_token", None)
    table = finished.parent / "points.csv"
    assert main(["sweep", str(finished.parent / "sweep.yaml"), "--table", str(table)]) == 0
    said = capsys.readouterr()
    assert "7 of 8 runs" in said.out
    assert f"{blind} is left out: it has no eval/valid/nelbo_per_token at its last step" in said.err
    with table.open() as file:
        errors = {row["run"]: row["standard_error"] for row in csv.DictReader(file)}
    assert (errors.pop(old), errors.pop(single)) == ("", "nan")
    assert set(errors.values()) == {"0.010000"}


@pytest.mark.parametrize("name", ["small-D8192-uniform_ratio0/metrics.jsonl", "sweep/attempts.jsonl"])
def test_a_damaged_line_is_named(name: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / name).parent.mkdir(exist_ok=True)
    with (finished / name).open("a") as file:
        file.write('{"step": 4,\n')
    assert main(["sweep", str(finished.parent / "sweep.yaml"), "--status"]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert "damaged" in error
    assert error.count("\n") == 1


def test_a_sweep_without_a_finished_run_has_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write_sweep(tmp_path)), "--table", str(tmp_path / "points.csv")]) == 2
    assert "holds no finished run with a held-out loss; see --status" in capsys.readouterr().err
