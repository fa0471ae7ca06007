"""The autoregressive twin loses the same under every layout that it takes, and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import launch, read_series, write_recipe
from tests.distributed.layouts import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, PP2, SP, TP2, worst

pytestmark = pytest.mark.distributed

LAYOUTS = {"tp2-sp": [TP2, SP], "pp2": [PP2], "dp2": []}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict) -> dict:
    return {
        **tiny_recipe,
        "diffusion": {"uniform_ratio": 0.0},
        "model": {**tiny_recipe["model"], "autoregressive": True},
        "sampling": {"kind": "left_to_right"},
        "train": {**tiny_recipe["train"], "num_steps": 8},
        "evaluation": {"interval": 4, "num_sequences": 20},
    }


@pytest.fixture(scope="module")
def one(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    launch(1, "train", write_recipe(folder, recipe, "one"))
    return folder / "runs/one/metrics.jsonl"


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name: str, recipe: dict, one: Path, tmp_path: Path) -> None:
    """Half of it after a resume."""
    path = write_recipe(tmp_path, recipe, name)
    launch(2, "train", path, [*LAYOUTS[name], "train.stop_after_step=4"])
    launch(2, "train", path, [*LAYOUTS[name], "--resume"])
    metrics = tmp_path / "runs" / name / "metrics.jsonl"
    for series, bound in (
        ("train/nelbo", LOSS_TOLERANCE),
        ("train/grad_norm", GRAD_NORM_TOLERANCE),
        ("eval/valid/nelbo_per_token", LOSS_TOLERANCE),
    ):
        values, wanted = read_series(metrics, series), read_series(one, series)
        assert len(values) >= 2
        assert worst(values, wanted) < bound
    assert wanted[-1] < wanted[0]
