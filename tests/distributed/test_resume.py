"""A run that was stopped, or goes on elsewhere, ends where one does that was not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch, read_series, write_recipe
from tests.distributed.layouts import CP2, GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, PLAIN, PP2, TP2
from tests.distributed.same import assert_same_tensors, load_tensors, read_numbers

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict) -> dict:
    """Ten steps, of fewer and larger micro-batches: half the collectives, and it changes nothing else."""
    return {
        **tiny_recipe,
        "train": {**tiny_recipe["train"], "num_steps": 10, "micro_batch_size": 4},
        "checkpoint": {"save_interval": 5, "keep_last": 3},
        "evaluation": {"interval": 4, "num_sequences": 20},
    }


@pytest.fixture(scope="module")
def with_dropout(recipe: dict) -> dict:
    """So that its randomness is resumed too."""
    return {**recipe, "model": {**recipe["model"], "hidden_dropout": 0.1, "attention_dropout": 0.1}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_stop_and_resume_give_the_same_bits(dtype: str, with_dropout: dict, tmp_path: Path) -> None:
    options = [TP2, f"precision.dtype={dtype}"]
    launch(2, "train", write_recipe(tmp_path, with_dropout, "whole"), options)
    path = write_recipe(tmp_path, with_dropout, "planned")
    launch(2, "train", path, [*options, "train.stop_after_step=3"])
    assert "resumes at step 3" in launch(2, "train", path, [*options, "--resume"])
    whole, planned = tmp_path / "runs/whole", tmp_path / "runs/planned"
    assert_same_tensors(*(run / "checkpoints/step_00000010" for run in (whole, planned)))
    numbers = [read_numbers(run / "metrics.jsonl") for run in (whole, planned)]
    steps = [[line for line in lines if "train/nelbo" in line] for lines in numbers]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 10


def test_changed_maths_is_refused(recipe: dict, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe, "one")
    launch(2, "train", path, [TP2, "train.stop_after_step=1"])
    output = launch(2, "train", path, [TP2, "diffusion.uniform_ratio=0.5", "--resume"], status=2)
    assert "diffusion.uniform_ratio: was 0.1, now 0.5" in output


BOUNDS = {
    "train/nelbo": LOSS_TOLERANCE,
    "train/grad_norm": GRAD_NORM_TOLERANCE,
    "eval/valid/nelbo_per_token": LOSS_TOLERANCE,
}
ELASTIC = {
    "tp2 to pp2": (2, [TP2], 2, [PP2]),
    "tp2 to dp2": (2, [TP2], 2, []),
    "tp2 to one": (2, [TP2], 1, []),
    "tp2-dp2 to pp2-cp2": (4, [TP2], 4, [PP2, CP2]),
}


@pytest.fixture(scope="module")
def whole(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """whole(processes, options) -> the metrics of ten steps at one go."""

    @functools.cache
    def run(processes: int, *options: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        launch(processes, "train", write_recipe(folder, recipe, "whole"), options)
        return folder / "runs/whole/metrics.jsonl"

    return run


@pytest.mark.parametrize("optimizer", [[], [PLAIN]], ids=["distributed", "plain"])
@pytest.mark.parametrize("way", ELASTIC)
def test_another_layout_loads_the_same_bits_and_goes_on(
    way: str, optimizer: list[str], recipe: dict, whole: Callable[..., Path], tmp_path: Path
) -> None:
    """Weights, moments and averages of the checkpoint, as the other layout saves them again at once."""
    processes, layout, other_processes, other_layout = ELASTIC[way]
    path = write_recipe(tmp_path, recipe, "elastic")
    launch(processes, "train", path, [*layout, *optimizer, "train.stop_after_step=5"])
    checkpoints = tmp_path / "runs/elastic/checkpoints"
    before = load_tensors(checkpoints / "step_00000005")
    program = Path(__file__).with_name("resaving_main.py")
    launch(other_processes, "train", path, [*other_layout, *optimizer, "--resume"], program)
    again = load_tensors(tmp_path / "runs/elastic/resaved/step_00000005")
    assert before.keys() == again.keys()
    for kind in ("decoder.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "ema."):
        assert any(name.startswith(kind) for name in before), kind
    for name in before:
        rows = min(len(before[name]), len(again[name]))  # tensor parallelism pads the vocabulary
        assert rows >= recipe["data"]["vocab_size"] or before[name].shape == again[name].shape
        assert torch.equal(before[name][:rows], again[name][:rows]), name
        assert not before[name][rows:].any(), name
        assert not again[name][rows:].any(), name
    expected_metrics = whole(processes, *layout, *optimizer)
    for name, bound in BOUNDS.items():
        resumed = read_series(tmp_path / "runs/elastic/metrics.jsonl", name)
        expected = read_series(expected_metrics, name)
        shared = slice(-1, None) if name.startswith("eval/") else slice(None)  # the stop evaluated once more
        assert resumed[shared] == pytest.approx(expected[shared], rel=bound)


def test_an_asynchronous_save_has_the_same_bits(recipe: dict, tmp_path: Path) -> None:
    """A save every other step, of which each waits for the one before it; the newest five stay."""
    for name, is_async in (("sync", "false"), ("async", "true")):
        path = write_recipe(tmp_path, recipe, name)
        options = [
            f"checkpoint.async_save={is_async}",
            "checkpoint.save_interval=2",
            "checkpoint.keep_last=5",
        ]
        launch(2, "train", path, options)
    runs = [tmp_path / f"runs/{name}" for name in ("sync", "async")]
    for step in (2, 4, 6, 8, 10):
        assert_same_tensors(*(run / f"checkpoints/step_{step:08d}" for run in runs))
        commons = [
            torch.load(run / f"checkpoints/step_{step:08d}/common.pt", weights_only=True) for run in runs
        ]
        states = [common["train_state"] for common in commons]
        assert states[0] == states[1]
        assert states[0]["step"] == step
    assert read_numbers(runs[0] / "metrics.jsonl") == read_numbers(runs[1] / "metrics.jsonl")
    assert "finished at step 10" in (runs[1] / "outcome").read_text()


def test_a_checkpoint_is_shared_out_over_replicas(recipe: dict, tmp_path: Path) -> None:
    """Both data-parallel processes write, and each hashes what it wrote."""
    launch(2, "train", write_recipe(tmp_path, recipe, "one"), ["train.stop_after_step=2"])
    folder = tmp_path / "runs/one/checkpoints/step_00000002"
    names = {path.name for path in folder.glob("*.distcp")}
    assert {name[:4] for name in names} == {"__0_", "__1_"}
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert names < manifest.keys()
