"""`sweep --table`: finished runs as `fit --points` reads them."""

from __future__ import annotations

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


def test_a_sweep_without_a_finished_run_has_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write_sweep(tmp_path)), "--table", str(tmp_path / "points.csv")]) == 2
    assert "holds no finished run; see --status" in capsys.readouterr().err
