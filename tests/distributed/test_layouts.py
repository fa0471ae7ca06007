"""Any layout gives the same noised batches, bit for bit, and the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch, read_series, write_recipe

pytestmark = pytest.mark.distributed

PROGRAM = (str(Path(__file__).with_name("recording_main.py")),)
TP = "parallel.tensor_model_parallel_size=2"
PP = "parallel.pipeline_model_parallel_size=2"
CP = "parallel.context_parallel_size=2"
LAYOUTS = {
    "tp2": (2, [TP]),
    "tp2-sp": (2, [TP, "parallel.sequence_parallel=true"]),
    "pp2": (2, [PP]),
    "pp2-vpp2": (2, [PP, "parallel.virtual_pipeline_model_parallel_size=2"]),
    "dp2": (2, []),
    "dp2-plain-optimizer": (2, ["optimizer.use_distributed_optimizer=false"]),
    "tp2-pp2-sp": (4, [TP, PP, "parallel.sequence_parallel=true"]),
    "tp2-dp2": (4, [TP]),
    "pp2-dp2": (4, [PP]),
    "cp2": (2, [CP]),
    "tp2-cp2-sp": (4, [TP, CP, "parallel.sequence_parallel=true"]),
    "pp2-cp2": (4, [PP, CP]),
}


def run(folder: Path, recipe: dict, name: str, num_processes: int, overrides: list[str]) -> dict:
    record = folder / f"record-{name}"
    record.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECORD_DIR", str(record))
        launch(num_processes, "train", write_recipe(folder, recipe, name), overrides, PROGRAM)
    metrics = folder / "runs" / name / "metrics.jsonl"
    seen: dict[str, dict[str, list]] = {}
    for path in record.iterdir():
        for sample_id, pieces in json.loads(path.read_text()).items():
            known = seen.setdefault(sample_id, {})
            for start, piece in pieces.items():
                assert known.setdefault(start, piece) == piece, "two ranks noised a sample differently"
    return {
        "nelbo": read_series(metrics, "train/nelbo"),
        "grad_norm": read_series(metrics, "train/grad_norm"),
        "held_out": read_series(metrics, "eval/valid/nelbo_per_token"),
        "samples": {sample_id: join(pieces) for sample_id, pieces in seen.items()},
    }


def join(pieces: dict[str, list]) -> tuple[str, list[int]]:
    """t and the whole z_t of a sample from the slices of the context-parallel ranks."""
    (t,) = {piece[0] for piece in pieces.values()}
    return t, [token for start in sorted(pieces, key=int) for token in pieces[start][1:]]


@pytest.fixture(scope="module")
def reference(tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """One process."""
    result = run(tmp_path_factory.mktemp("reference"), tiny_recipe, "one", 1, [])
    assert len(result["nelbo"]) == 20
    assert result["nelbo"][-1] < result["nelbo"][0] - 0.3, "it must train, or equal losses mean little"
    assert len(result["samples"]) == 20 * 8
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_with_one_process(
    layout: str, reference: dict, tiny_recipe: dict, tmp_path: Path
) -> None:
    num_processes, overrides = LAYOUTS[layout]
    result = run(tmp_path, tiny_recipe, layout, num_processes, overrides)
    assert result["samples"] == reference["samples"]
    assert result["nelbo"] == pytest.approx(reference["nelbo"], rel=2e-5)
    assert result["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    assert result["held_out"] == pytest.approx(reference["held_out"], rel=2e-5)


def test_tied_head_agrees_across_the_pipeline(tiny_recipe: dict, tmp_path: Path) -> None:
    tied = ["model.share_embeddings_and_output_weights=true", "train.num_steps=8"]
    one = run(tmp_path, tiny_recipe, "one", 1, tied)
    pipeline = run(tmp_path, tiny_recipe, "pp2", 2, [*tied, PP])
    assert pipeline["nelbo"] == pytest.approx(one["nelbo"], rel=2e-5)
    assert pipeline["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
