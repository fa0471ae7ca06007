"""Any layout gives the same noised batches, bit for bit, and the same losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.layouts import (
    GRAD_NORM_TOLERANCE,
    LAYOUTS,
    LOSS_TOLERANCE,
    NUM_STEPS,
    PP2,
    Trained,
    compare,
    recipe_for_layouts,
    train,
    worst,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict) -> dict:
    return recipe_for_layouts(tiny_recipe)


@pytest.fixture(scope="module")
def one(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One process."""
    result = train(tmp_path_factory.mktemp("one"), recipe, "one", 1, [])
    assert len(result.nelbo) == NUM_STEPS
    assert result.nelbo[-1] < result.nelbo[0] - 0.3, "it must train, or equal losses mean little"
    assert len(result.samples) == NUM_STEPS * 8
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_with_one_process(
    layout: str, one: Trained, recipe: dict, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    num_processes, overrides = LAYOUTS[layout]
    result = train(tmp_path, recipe, layout, num_processes, overrides)
    row = compare(layout, result, one)
    record_property("layout", dataclasses.asdict(row))
    assert result.samples == one.samples
    assert row.nelbo <= LOSS_TOLERANCE
    assert row.grad_norm <= GRAD_NORM_TOLERANCE
    assert row.held_out <= LOSS_TOLERANCE


def test_tied_head_agrees_across_the_pipeline(recipe: dict, tmp_path: Path) -> None:
    tied = ["model.share_embeddings_and_output_weights=true", "train.num_steps=8"]
    single = train(tmp_path, recipe, "one", 1, tied)
    pipeline = train(tmp_path, recipe, "pp2", 2, [*tied, PP2])
    assert worst(pipeline.nelbo, single.nelbo) <= LOSS_TOLERANCE
    assert worst(pipeline.grad_norm, single.grad_norm) <= GRAD_NORM_TOLERANCE
