"""The whole way through the house, as a user goes it: train on two processes, evaluate and sample on one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.launch import launch, read_series, write_recipe

pytestmark = pytest.mark.distributed

TP = "parallel.tensor_model_parallel_size=2"
PP = "parallel.pipeline_model_parallel_size=2"
CP = "parallel.context_parallel_size=2"


@pytest.fixture(scope="module")
def trained(tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe file, run folder) of a tensor-parallel run with a local MLflow store."""
    folder = tmp_path_factory.mktemp("main_job")
    recipe = {**tiny_recipe, "tracking": {"mlflow": "local", "experiment": "main-job", "parent_run": "jobs"}}
    recipe["optimizer"] = {**recipe["optimizer"], "lr": 0.01}
    path = write_recipe(folder, recipe, "job")
    launch(2, "train", path, [TP])
    return path, folder / "runs/job"


def test_run_folder_tells_the_whole_story(trained: tuple[Path, Path]) -> None:
    _, run = trained
    names = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "environment.jsonl", "metrics.jsonl", "checkpoints"} <= names
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert next(iter(first)) == "step"
    assert {
        "consumed_samples",
        "consumed_tokens",
        "consumed_flops",
        "train/nelbo",
        "train/grad_norm",
    } <= first.keys()
    assert first["consumed_samples"] == 8
    assert first["consumed_tokens"] == 8 * 32
    nelbo = read_series(run / "metrics.jsonl", "train/nelbo")
    assert sum(nelbo[-5:]) < sum(nelbo[:5]) - 2.5


def test_mlflow_has_every_point_and_the_recipe(trained: tuple[Path, Path]) -> None:
    from mlflow.tracking import MlflowClient

    _, run = trained
    client = MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("main-job")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"job", "jobs"}
    logged = runs["job"]
    assert logged.info.status == runs["jobs"].info.status == "FINISHED"
    assert logged.data.tags["mlflow.parentRunId"] == runs["jobs"].info.run_id
    assert logged.data.tags["layout"] == "tp2-pp1-cp1-dp1"
    assert {"git_commit", "recipe_hash", "uniform_ratio"} <= logged.data.tags.keys()
    assert logged.data.params["diffusion.uniform_ratio"] == "0.1"
    assert {"consumed_tokens", "consumed_flops", "train/nelbo"} <= logged.data.metrics.keys()
    history = client.get_metric_history(logged.info.run_id, "train/nelbo")
    written = read_series(run / "metrics.jsonl", "train/nelbo")
    assert [point.value for point in sorted(history, key=lambda point: point.step)] == pytest.approx(written)
    assert any(artifact.path == "recipe.yaml" for artifact in client.list_artifacts(logged.info.run_id))


def test_evaluate_on_one_process_repeats_what_training_saw(trained: tuple[Path, Path]) -> None:
    recipe, run = trained
    output = launch(1, "evaluate", recipe)
    record = json.loads((run / "evaluations/step_00000020-ema.json").read_text())
    logged = read_series(run / "metrics.jsonl", "eval/valid/nelbo_per_token")[-1]
    assert record["nelbo_per_token"] == pytest.approx(logged, rel=2e-5)
    for name in ("nats_per_token", "standard_error", "perplexity", "bits_per_byte"):
        bounds = read_series(run / "metrics.jsonl", f"eval/valid/bound/{name}")
        assert len(bounds) > 1  # of every evaluation
        assert record["bound"][name] == pytest.approx(bounds[-1], rel=2e-5)
    assert record["step"] == 20
    assert 0 < record["standard_error"] < record["nelbo_per_token"]
    assert f"{record['nelbo_per_token']:.4f}" in output
    assert "plain weights" in launch(1, "evaluate", recipe, ["--no-ema"])
    plain = json.loads((run / "evaluations/step_00000020-plain.json").read_text())
    assert plain["nelbo_per_token"] != record["nelbo_per_token"]


def test_bounds_do_not_depend_on_the_layout(trained: tuple[Path, Path]) -> None:
    """Two processes each way; every figure of the record, to the rounding of float32."""
    recipe, run = trained
    path, records = run / "evaluations/step_00000020-ema.json", []
    for num_processes, layout in ((1, []), (2, []), (2, [TP]), (2, [PP]), (2, [CP])):
        path.unlink(missing_ok=True)
        output = launch(num_processes, "evaluate", recipe, [*layout, "--discrete-steps", "8"])
        assert "bound of 8 sampling steps" in output
        records.append(json.loads(path.read_text()))
    for record in records:
        assert len(record.pop("checkpoint_hash")) == 32
        assert record["bound"]["parts"]["prior"]["standard_error"] == 0
    flat = [dict(_leaves(record)) for record in records]
    assert all(each == pytest.approx(flat[0], rel=2e-5, abs=1e-7) for each in flat[1:])


def _leaves(tree: dict, above: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        elif isinstance(value, float):
            yield f"{above}{name}", value


def test_samples_do_not_depend_on_the_layout(trained: tuple[Path, Path]) -> None:
    recipe, _ = trained
    ask = ["--steps", "6", "--num-samples", "2", "--prompt", "To be", "--trace", "3"]
    texts = []
    for num_processes, layout in ((1, []), (2, [TP]), (2, [PP]), (2, [CP])):
        output = launch(num_processes, "sample", recipe, [*layout, *ask])
        assert re.search(r"ancestral, [\d.]+ network calls", output)
        assert len(re.findall(r"unigram entropy \d\.\d+ nats", output)) == 2
        texts.append(output[output.index("--- sample 1") :].split("\nW1", 1)[0].strip())
    assert texts[0].splitlines()[1].startswith("To be")
    assert texts[0] == texts[1] == texts[2] == texts[3]
