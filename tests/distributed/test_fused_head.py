"""Training with the head in the loss gives the losses of training with logits, under every kind of layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import launch, read_series, write_recipe

pytestmark = pytest.mark.distributed

FUSED, UNFUSED = "train.fuse_head=always", "train.fuse_head=never"
TIED = "model.share_embeddings_and_output_weights=true"
SEQUENCE_PARALLEL = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PIPELINE = "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "tied": (1, [TIED]),
    "dp2": (2, []),  # the optimizer is distributed
    "pp2-vpp2": (2, [PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"]),
    "tied-pp2": (2, [TIED, PIPELINE]),
    "tp2-cp2": (4, ["parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2"]),
    "tied-tp2-pp2-sp": (4, [TIED, PIPELINE, *SEQUENCE_PARALLEL]),
}


def run(folder: Path, recipe: dict, name: str, num_processes: int, overrides: list[str]) -> dict[str, list]:
    launch(num_processes, "train", write_recipe(folder, recipe, name), [*overrides, "train.num_steps=8"])
    metrics = folder / "runs" / name / "metrics.jsonl"
    names = ("train/nelbo", "train/grad_norm", "eval/valid/nelbo_per_token")
    return {name: read_series(metrics, name) for name in names}


@pytest.fixture(scope="module")
def with_logits(tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict]:
    """One process without the knob; {tied: metrics}."""
    folder = tmp_path_factory.mktemp("with_logits")
    return {
        tied: run(folder, tiny_recipe, f"tied-{tied}", 1, [UNFUSED, *[TIED] * tied]) for tied in (False, True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_as_with_logits(
    layout: str, with_logits: dict[bool, dict], tiny_recipe: dict, tmp_path: Path
) -> None:
    num_processes, overrides = LAYOUTS[layout]
    want = with_logits[TIED in overrides]
    got = run(tmp_path, tiny_recipe, layout, num_processes, [*overrides, FUSED])
    assert len(got["train/nelbo"]) == 8
    assert got["train/nelbo"] == pytest.approx(want["train/nelbo"], rel=2e-5)
    assert got["train/grad_norm"] == pytest.approx(want["train/grad_norm"], rel=1e-4)
    evaluated = "eval/valid/nelbo_per_token"
    assert got[evaluated] == pytest.approx(want[evaluated], rel=2e-5)
