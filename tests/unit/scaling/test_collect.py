"""Points from run folders, tables and an MLflow store; what cannot be used is skipped, counted and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.model.small import small_config
from tests.unit.scaling.synthetic import draw_runs, write_table
from xdlm_megatron.config.derive import flops_per_token, num_parameters
from xdlm_megatron.config.load import dump_recipe
from xdlm_megatron.scaling.collect import HELD_OUT_LOSS, collect_mlflow, collect_runs, collect_table
from xdlm_megatron.scaling.run import Sources, collect
from xdlm_megatron.tracking.jsonl import encode_line
from xdlm_megatron.tracking.parent import find_or_create_parent


def make_run(folder: Path, losses: dict[int, float], **sections: dict[str, Any]) -> Path:
    """A run folder as training leaves it; losses by step, 10 being the last."""
    config = small_config(run={"name": folder.name, "output_dir": str(folder.parent)}, **sections)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(config))
    lines = [encode_line(step, {"train/nelbo": 4.0}, 1e9) for step in range(1, max(losses) + 1)]
    lines += [encode_line(step, {HELD_OUT_LOSS: loss}, 1e9) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    return folder


def test_a_finished_run_is_a_point(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", {5: 3.5, 10: 3.25}, diffusion={"uniform_ratio": 0.5})
    found = collect_runs([folder], "total")
    config = small_config()
    (point,) = found.points
    assert point.loss == 3.25
    assert point.params == num_parameters(config)
    assert point.tokens == 10 * 4 * 12  # steps, sequences a step, tokens a sequence
    assert point.flops == flops_per_token(config) * point.tokens
    assert point.uniform_ratio == 0.5
    assert found.skipped == []


def test_the_count_of_parameters_can_be_chosen(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", {10: 3.25})
    total, rest = (collect_runs([folder], count).points[0].params for count in ("total", "non-embedding"))
    assert total - rest == 2 * 48 * 32  # padded vocabulary times width, twice
    assert "without embedding" in collect_runs([folder], "non-embedding").notes[0]


def test_runs_that_cannot_be_used_are_skipped_with_a_reason(tmp_path: Path) -> None:
    make_run(tmp_path / "good", {10: 3.0})
    make_run(tmp_path / "unfinished", {5: 3.0})
    make_run(tmp_path / "never", {10: 3.0})
    (tmp_path / "never/metrics.jsonl").write_bytes(encode_line(10, {"train/nelbo": 4.0}, 1e9))
    make_run(tmp_path / "exploded", {10: float("nan")})
    make_run(tmp_path / "torn", {10: 3.0})
    (tmp_path / "torn/recipe.yaml").write_text("run: 3")
    make_run(tmp_path / "gone", {10: 3.0})
    (tmp_path / "gone/metrics.jsonl").unlink()
    found = collect_runs([tmp_path], "total")
    assert [point.run for point in found.points] == [str(tmp_path / "good")]
    reasons = {Path(row.source).name: row.reason for row in found.skipped}
    assert reasons["unfinished"] == "not finished: step 5 of 10"
    assert reasons["never"] == f"has no {HELD_OUT_LOSS} at its last step 10"
    assert reasons["exploded"] == "loss is nan, not a positive number"
    assert "bad field" in reasons["torn"]
    assert "No such file" in reasons["gone"]


def test_a_path_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a run folder nor a folder of them"):
        collect_runs([tmp_path], "total")


# Tables


def test_a_table_with_the_three_columns(tmp_path: Path) -> None:
    points = draw_runs(0)
    path = write_table(tmp_path / "p.csv", points, ("params", "tokens", "loss"))
    found = collect_table(path)
    assert [(p.params, p.tokens, p.loss) for p in found.points] == [
        (p.params, p.tokens, p.loss) for p in points
    ]
    assert [p.flops for p in found.points] == pytest.approx([p.flops for p in points])
    assert found.notes == ["no column of FLOPs: C = 6 N D"]
    assert found.points[0].uniform_ratio is None


def test_headings_of_other_tables_and_tokens_from_flops(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("\ufeffx,Model Size,Training FLOP,loss\n1,1e8,6e18,3.5\n")
    (point,) = collect_table(path).points
    assert (point.params, point.tokens, point.flops) == (1e8, pytest.approx(1e10), 6e18)


def test_bad_rows_are_skipped_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        "run,params,tokens,loss,uniform_ratio\n"
        "a,1e8,1e9,3.5,0\n"
        "b,x,1e9,3.5,0\n"
        "\n"
        "c,1e8,-1,3.5,0\n"
        "d,1e8,1e9,nan,0\n"
        "e,1e8,1e9,inf,0\n"
        "f,1e8\n"
        "g,1e8,1e9,3.4,7\n"
        "a,1e8,1e9,3.5,0\n"
        "h,0,1e9,3.4,0\n"
    )
    found = collect_table(path)
    assert [point.run for point in found.points] == ["a"]
    assert {row.source: row.reason for row in found.skipped} == {
        "p.csv, line 3": "params is 'x', not a number",
        "p.csv, line 5": "tokens is -1, not a positive number",
        "p.csv, line 6": "loss is nan, not a positive number",
        "p.csv, line 7": "loss is inf, not a positive number",
        "p.csv, line 8": "loss is '', not a number",
        "p.csv, line 9": "uniform_ratio is 7, not in [0, 1]",
        "p.csv, line 10": "the same as line 2",
        "p.csv, line 11": "params is 0, not a positive number",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column params, loss, tokens (or flops) in its first line (it has nothing)"),
        ("params,loss\n1,2\n", "no column tokens (or flops)"),
        ("tokens,loss\n1,2\n", "no column params"),
    ],
)
def test_a_table_without_its_columns(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match="no column") as error:
        collect_table(tmp_path / "p.csv")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "params,tokens,loss\n".encode("utf-16"),
            "p.csv is not text in UTF-8; save the table as CSV in UTF-8",
        ),
        (
            b'params,tokens,loss\n1,2,"3\n4,5,6\n',
            "p.csv, line 3: unexpected end of data; is a quote left open?",
        ),
    ],
)
def test_what_is_no_table(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.csv") as error:
        collect_table(tmp_path / "p.csv")
    assert str(error.value).endswith(message)


def test_ratios_are_apart_and_in_order(tmp_path: Path) -> None:
    points = [p for ratio in (1.0, 0.0, 0.1) for p in draw_runs(0, uniform_ratio=ratio)[:2]]
    path = write_table(tmp_path / "p.csv", points, ("params", "tokens", "loss", "uniform_ratio"))
    groups = collect_table(path).by_uniform_ratio()
    assert list(groups) == [0.0, 0.1, 1.0]
    assert [len(group) for group in groups.values()] == [2, 2, 2]


def test_one_source_and_a_point_are_needed(tmp_path: Path) -> None:
    for sources in (Sources(), Sources(runs=["a"], table="b")):
        with pytest.raises(ValueError, match="fit needs one source"):
            collect(sources)
    (tmp_path / "p.csv").write_text("params,tokens,loss\n1,2,x\n")
    with pytest.raises(ValueError, match=r"no usable point among 1: p.csv, line 2: loss is 'x'"):
        collect(Sources(table=str(tmp_path / "p.csv")))


# MLflow


def test_an_mlflow_store_gives_the_same_points(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("ladder", artifact_location=str(tmp_path / "artifacts"))
    for name, losses in (("done", {5: 3.5, 10: 3.25}), ("stopped", {5: 3.5})):
        folder = make_run(tmp_path / "runs" / name, losses)
        run = client.create_run(experiment, run_name=name).info.run_id
        client.log_artifact(run, str(folder / "recipe.yaml"))
        for step, loss in losses.items():
            client.log_metric(run, HELD_OUT_LOSS, loss, step=step)
    client.create_run(experiment, run_name="empty")
    find_or_create_parent(client, experiment, "ladder")
    found = collect_mlflow(uri, "ladder", "total")
    (reference,) = collect_runs([tmp_path / "runs/done"], "total").points
    (point,) = found.points
    assert (point.params, point.tokens, point.loss) == (reference.params, reference.tokens, 3.25)
    reasons = {row.source.split()[0]: row.reason for row in found.skipped}
    assert reasons["stopped"] == "not finished: step 5 of 10"
    assert "has no artifact recipe.yaml" in reasons["empty"]
    assert set(reasons) == {"stopped", "empty"}
    with pytest.raises(ValueError, match="has no experiment 'other'"):
        collect_mlflow(uri, "other", "total")


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/mlflow\.db: no such file; give the mlflow\.db beside"):
        collect_mlflow(f"sqlite:///{tmp_path}/nowhere/mlflow.db", "xdlm", "total")
    assert not (tmp_path / "nowhere").exists()
