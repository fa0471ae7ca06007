"""Growing batches: layout, micro-batch and a resume in the middle of the growth change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import launch, read_series, write_recipe
from tests.distributed.layouts import (
    CP2,
    GRAD_NORM_TOLERANCE,
    LOSS_TOLERANCE,
    PP2,
    TP2,
    Trained,
    train,
    worst,
)
from tests.distributed.same import assert_same_tensors, read_numbers

pytestmark = pytest.mark.distributed

SIZES = [4, 4, 8, 12, 16, 16, 16, 16, 16, 16]  # (16 - 4) / 4 = 3 parts of 24 / 3 = 8 samples
LAYOUTS = {
    "dp2": (2, []),
    "dp2-micro-batches of 1": (2, ["train.micro_batch_size=1"]),
    "micro-batches of 4": (1, ["train.micro_batch_size=4"]),
    "tp2": (2, [TP2]),
    "pp2": (2, [PP2]),
    "cp2": (2, [CP2]),
}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict) -> dict:
    ramp = {"num_steps": len(SIZES), "global_batch_size": 16, "rampup_batch_size": [4, 4, 24]}
    return {
        **tiny_recipe,
        "model": {**tiny_recipe["model"], "num_layers": 2},
        "train": {**tiny_recipe["train"], **ramp},
        "evaluation": {"interval": 100, "num_sequences": 8},
    }


@pytest.fixture(scope="module")
def one(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One process, micro-batches of two."""
    folder = tmp_path_factory.mktemp("one")
    result = train(folder, recipe, "one", 1, [])
    consumed = read_series(folder / "runs/one/metrics.jsonl", "consumed_samples")
    assert consumed == [sum(SIZES[:step]) for step in range(1, len(SIZES) + 1)]
    assert read_series(folder / "runs/one/metrics.jsonl", "consumed_tokens") == [32 * n for n in consumed]
    # Stratified over the batch as it is: each of its parts of the unit interval has one time.
    first = 0
    for size in SIZES:
        times = [float.fromhex(one_sample[0]) for one_sample in samples_of(result, first, size)]
        strata = [int((t - 1e-3) / (1 - 1e-3) * size) for t in times]
        assert strata == list(range(size))
        first += size
    return result


def samples_of(result: Trained, first: int, size: int) -> list[tuple[str, list[int]]]:
    return [result.samples[str(sample_id)] for sample_id in range(first, first + size)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, one: Trained, recipe: dict, tmp_path: Path) -> None:
    num_processes, overrides = LAYOUTS[layout]
    result = train(tmp_path, recipe, "run", num_processes, overrides)
    assert result.samples == one.samples
    assert worst(result.nelbo, one.nelbo) <= LOSS_TOLERANCE
    assert worst(result.grad_norm, one.grad_norm) <= GRAD_NORM_TOLERANCE


def test_a_resume_in_the_middle(recipe: dict, tmp_path: Path) -> None:
    launch(2, "train", write_recipe(tmp_path, recipe, "whole"))
    path = write_recipe(tmp_path, recipe, "stopped")
    launch(2, "train", path, ["train.stop_after_step=3"])
    launch(2, "train", path, ["train.stop_after_step=5", "--resume"])
    launch(2, "train", path, ["--resume"])
    whole, stopped = (tmp_path / f"runs/{name}" for name in ("whole", "stopped"))
    assert_same_tensors(*(run / "checkpoints/step_00000010" for run in (whole, stopped)))
    lines = [
        [line for line in read_numbers(run / "metrics.jsonl") if "train/nelbo" in line]
        for run in (whole, stopped)
    ]
    assert lines[0] == lines[1]
