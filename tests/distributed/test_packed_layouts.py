"""Packed documents: a batch's loss is the sum over its documents run alone, however the model is split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.launch import launch, read_series, write_recipe
from xdlm_megatron.config.load import build_config
from xdlm_megatron.data.batch import Batch
from xdlm_megatron.data.build import build_train_samples
from xdlm_megatron.data.packing import PADDING
from xdlm_megatron.data.preprocess import PreprocessOptions, preprocess
from xdlm_megatron.model.build import build_model
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import open_mesh

pytestmark = pytest.mark.distributed

TP, PP, CP, VPP = (
    f"parallel.{name}_parallel_size="
    for name in ("tensor_model", "pipeline_model", "context", "virtual_pipeline_model")
)
RECOMPUTE = [f"model.mcore.recompute_{key}" for key in ("granularity=full", "method=uniform", "num_layers=1")]
LAYOUTS = {
    "tp2-sp": (2, [TP + "2", "parallel.sequence_parallel=true"]),
    "pp2": (2, [PP + "2"]),
    "pp4": (4, [PP + "4"]),
    "pp2-vpp2": (2, [PP + "2", VPP + "2"]),
    "cp2": (2, [CP + "2"]),
    "cp2-fused-head": (2, [CP + "2", "train.fuse_head=always"]),
    "tp2-pp2": (4, [TP + "2", PP + "2"]),
    "tp2-cp2": (4, [TP + "2", CP + "2"]),
    "pp2-cp2": (4, [PP + "2", CP + "2"]),
    "pp2-cp2-full-recompute": (4, [PP + "2", CP + "2", *RECOMPUTE]),
    "dp2": (2, []),
}


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict, tiny_data: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Short documents with prompts, each at a time of its own, some samples cut short."""
    folder = tmp_path_factory.mktemp("prompted")
    corpus = Path(tiny_data["train_prefix"]).with_suffix(".jsonl").read_text()
    scenes = [json.loads(line)["text"] for line in corpus.splitlines()]
    lines = [line for scene in scenes for line in scene.splitlines() if len(line) > 16][:300]
    records = [{"prompt": line[: n % 7], "text": line[n % 7 : 16]} for n, line in enumerate(lines)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    preprocess(
        PreprocessOptions(
            inputs=(str(folder / "lines.jsonl"),),
            output=str(folder / "lines"),
            tokenizer=str(tiny_data["tokenizer"]),
            prompt_key="prompt",
            valid_fraction=0.1,
        )
    )
    return {
        **tiny_recipe,
        "diffusion": {"uniform_ratio": 0.1, "time_per": "document"},
        "model": {**tiny_recipe["model"], "zero_init_head": False, "init_method_std": 0.2},
        "data": {
            **tiny_data,
            "train_prefix": str(folder / "lines"),
            "valid_prefix": str(folder / "lines_valid"),
            "packing": "documents",
            "clean_prompts": True,
            "random_length_fraction": 0.3,
        },
        "train": {**tiny_recipe["train"], "num_steps": 4},
    }


def alone(recipe: dict) -> float:
    """Nats per scored token of the first batch, one document at a time through the initial model."""
    config = build_config(recipe)
    size = config.train.global_batch_size
    samples = build_train_samples(config, torch.device("cpu"))
    batch = samples.build(np.arange(size), np.arange(size), size)
    names = ("x0_BS", "zt_BS", "t_BS", "alpha_BS", "beta_BS", "dalpha_BS", "scored_BS")
    total = num_documents = 0
    with open_mesh() as mesh, torch.no_grad():
        (model,) = build_model(config, mesh)
        objective = Objective(samples.noise, mesh)
        for row, document_T in enumerate(batch.document_BT):
            for number in document_T[document_T != PADDING].unique():
                span = document_T == number
                document = Batch(*(getattr(batch, name)[row : row + 1, span] for name in names))
                output, loss_function = objective.forward_step(iter([document]), model)
                total += loss_function(output)[0].item()
                num_documents += 1
    assert num_documents == size if config.data.packing == "padded" else num_documents > 2 * size
    assert 0 < batch.scored_BS.double().mean() < 0.8
    return total / int(batch.scored_BS.sum())


@pytest.fixture(scope="module")
def reference(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """One process; its first loss is that of the documents alone."""
    metrics = run(tmp_path_factory.mktemp("reference"), recipe, "one", 1, [])
    assert metrics["train/nelbo"][0] == pytest.approx(alone(recipe), rel=1e-5)
    return metrics


def run(folder: Path, recipe: dict, name: str, num_processes: int, overrides: list[str]) -> dict[str, list]:
    launch(num_processes, "train", write_recipe(folder, recipe, name), overrides)
    names = ("train/nelbo", "train/grad_norm", "eval/valid/nelbo_per_token")
    metrics = folder / "runs" / name / "metrics.jsonl"
    return {metric: read_series(metrics, metric) for metric in names}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_documents_equal_documents_alone(
    layout: str, reference: dict, recipe: dict, tmp_path: Path
) -> None:
    num_processes, overrides = LAYOUTS[layout]
    metrics = run(tmp_path, recipe, layout, num_processes, overrides)
    assert metrics["train/nelbo"][0] == pytest.approx(alone(recipe), rel=1e-5)
    assert metrics["train/nelbo"] == pytest.approx(reference["train/nelbo"], rel=2e-5)
    assert metrics["train/grad_norm"] == pytest.approx(reference["train/grad_norm"], rel=1e-4)
    held_out = "eval/valid/nelbo_per_token"
    assert metrics[held_out] == pytest.approx(reference[held_out], rel=2e-5)


def test_split_padded_prompts_equal_documents_alone(recipe: dict, tmp_path: Path) -> None:
    """One document a sample behind its clean prompt, the rest of it padding, over slices of both kinds."""
    padded = {
        **recipe,
        "diffusion": {**recipe["diffusion"], "time_per": "sequence"},
        "data": {**recipe["data"], "packing": "padded"},
    }
    one = run(tmp_path, padded, "one", 1, [])
    split = run(tmp_path, padded, "split", 4, [TP + "2", CP + "2", "parallel.sequence_parallel=true"])
    assert one["train/nelbo"][0] == pytest.approx(alone(padded), rel=1e-5)
    assert split["train/nelbo"] == pytest.approx(one["train/nelbo"], rel=2e-5)
    assert split["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
    held_out = "eval/valid/nelbo_per_token"
    assert split[held_out] == pytest.approx(one[held_out], rel=2e-5)
