"""Messages that overlap with work change when they are sent and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import launch, write_recipe
from tests.distributed.same import assert_same_tensors, read_numbers

pytestmark = pytest.mark.distributed

REDUCE = "parallel.overlap_grad_reduce=true"
GATHER = "parallel.overlap_param_gather=true"


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict) -> dict:
    """Several micro-batches a step, evaluations between steps, two checkpoints; k = 0 would fuse the head."""
    return {
        **tiny_recipe,
        "diffusion": {"uniform_ratio": 0.0},
        "train": {**tiny_recipe["train"], "num_steps": 6, "log_interval": 1},
        "checkpoint": {"save_interval": 3},
        "evaluation": {"interval": 2, "num_sequences": 20},
    }


@pytest.fixture(scope="module")
def plain(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    launch(2, "train", write_recipe(folder, recipe, "run"), ["train.fuse_head=never"])
    return folder / "runs/run"


@pytest.mark.parametrize("options", [[REDUCE], [REDUCE, GATHER]], ids=["reduce", "reduce and gather"])
def test_overlap_gives_the_same_bits(options: list[str], recipe: dict, plain: Path, tmp_path: Path) -> None:
    """Losses, evaluations and checkpoints, before and behind a resume."""
    path = write_recipe(tmp_path, recipe, "run")
    launch(2, "train", path, [*options, "train.stop_after_step=3"])
    launch(2, "train", path, [*options, "--resume"])
    run = tmp_path / "runs/run"
    for step in (3, 6):
        assert_same_tensors(*(folder / f"checkpoints/step_{step:08d}" for folder in (plain, run)))
    lines, wanted = (read_numbers(folder / "metrics.jsonl") for folder in (run, plain))
    steps = [[line for line in numbers if "train/nelbo" in line] for numbers in (lines, wanted)]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 6
    held_out = [
        [line for line in numbers if "eval/valid/nelbo_per_token" in line] for numbers in (lines, wanted)
    ]
    assert [line for line in held_out[0] if line["step"] != 3] == held_out[1]  # the stop evaluated once more
