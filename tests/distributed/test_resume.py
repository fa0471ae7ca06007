"""A run that was interrupted ends with the very weights of one that was not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch, launch_and_kill, read_series, write_recipe

pytestmark = pytest.mark.distributed

TP = "parallel.tensor_model_parallel_size=2"


def load_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name: weights, optimizer, averages; read without Megatron."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    reader = FileSystemReader(str(checkpoint))
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _load_state_dict(state, storage_reader=reader, no_dist=True)
    return state


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = load_tensors(one), load_tensors(other)
    assert first.keys() == second.keys()
    assert any(name.startswith("ema.") for name in first)
    assert any("exp_avg_sq" in name for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict) -> dict:
    """Ten steps, with dropout, so that its randomness is resumed too."""
    return {
        **tiny_recipe,
        "model": {**tiny_recipe["model"], "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "train": {**tiny_recipe["train"], "num_steps": 10},
        "checkpoint": {"save_interval": 5, "keep_last": 3},
        "evaluation": {"interval": 4, "num_sequences": 20},
    }


@pytest.fixture(scope="module")
def uninterrupted(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ten steps at one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    launch(2, "train", write_recipe(folder, recipe, "whole"), [TP])
    return folder / "runs/whole"


def test_killed_after_five_steps_resumes_to_the_same_bits(
    recipe: dict, uninterrupted: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe, "killed")
    run = tmp_path / "runs/killed"
    launch_and_kill(2, path, [TP], run / "metrics.jsonl", after_step=6, how=signal.SIGKILL)
    assert (run / "checkpoints/latest").read_text().strip() == "step_00000005"
    output = launch(2, "train", path, [TP, "--resume"])
    assert "resumes at step 5" in output
    assert_same_tensors(run / "checkpoints/step_00000010", uninterrupted / "checkpoints/step_00000010")
    for name in ("train/nelbo", "train/grad_norm", "eval/valid/nelbo_per_token"):
        assert read_series(run / "metrics.jsonl", name) == read_series(uninterrupted / "metrics.jsonl", name)


def test_planned_stop_and_resume_give_the_same_bits(
    recipe: dict, uninterrupted: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe, "planned")
    launch(2, "train", path, [TP, "train.stop_after_step=3"])
    launch(2, "train", path, [TP, "--resume"])
    run = tmp_path / "runs/planned"
    assert_same_tensors(run / "checkpoints/step_00000010", uninterrupted / "checkpoints/step_00000010")


def test_sigterm_saves_and_stops(recipe: dict, tmp_path: Path) -> None:
    long = {**recipe, "train": {**recipe["train"], "num_steps": 100_000}}
    path = write_recipe(tmp_path, long, "stopped")
    run = tmp_path / "runs/stopped"
    output = launch_and_kill(2, path, [TP], run / "metrics.jsonl", after_step=6, how=signal.SIGTERM)
    last = int(read_series(run / "metrics.jsonl", "step")[-1])
    assert f"stopped at step {last}" in output
    assert (run / "checkpoints/latest").read_text().strip() == f"step_{last:08d}"


def test_another_layout_goes_on_with_the_same_samples(
    recipe: dict, uninterrupted: Path, tmp_path: Path
) -> None:
    """Tensor parallel to pipeline and to data parallel, without dropout: it draws per layout."""
    plain = {**recipe, "model": {k: v for k, v in recipe["model"].items() if "dropout" not in k}}
    whole = write_recipe(tmp_path, plain, "whole")
    launch(2, "train", whole, [TP])
    expected = read_series(tmp_path / "runs/whole/metrics.jsonl", "train/nelbo")
    for name, layout in (("pp", ["parallel.pipeline_model_parallel_size=2"]), ("dp", [])):
        path = write_recipe(tmp_path, plain, name)
        launch(2, "train", path, [TP, "train.stop_after_step=5"])
        launch(2, "train", path, [*layout, "--resume"])
        resumed = read_series(tmp_path / f"runs/{name}/metrics.jsonl", "train/nelbo")
        assert resumed == pytest.approx(expected, rel=1e-4)


def test_changed_maths_is_refused(recipe: dict, uninterrupted: Path) -> None:
    path = uninterrupted.parents[1] / "whole.yaml"
    with pytest.raises(AssertionError, match=r"diffusion.uniform_ratio: was 0.1, now 0.5"):
        launch(2, "train", path, [TP, "diffusion.uniform_ratio=0.5", "--resume"])
