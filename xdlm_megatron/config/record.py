"""What MLflow knows a run by: params, which stay, and tags of its last start."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from xdlm_megatron.config.derive import Derived
from xdlm_megatron.config.load import dump_recipe, to_tree
from xdlm_megatron.config.schema import RunConfig

ENVIRONMENT = "environment.jsonl"  # of a run folder: a line for every start (train/provenance.py)


def recipe_hash(config: RunConfig) -> str:
    """Short hash of the resolved recipe."""
    return hashlib.sha256(dump_recipe(config).encode()).hexdigest()[:12]


def last_start(folder: Path) -> dict[str, Any]:
    """The run folder's line of the last start. Raises ValueError where that is nothing."""
    lines = (folder / ENVIRONMENT).read_bytes().split(b"\n")[:-1]  # what follows is torn
    if not lines:
        raise ValueError(f"{folder / ENVIRONMENT} is empty; the run has never started")
    start: dict[str, Any] = json.loads(lines[-1])
    return start


def run_params(config: RunConfig, figures: Derived) -> dict[str, Any]:
    """Every knob, and the size of the model and of its training."""
    return to_tree(config) | {
        "num_parameters": figures.num_parameters,
        "num_non_embedding_parameters": figures.num_non_embedding_parameters,
        "total_tokens": figures.total_tokens,
        "total_flops": f"{figures.flops_per_token * figures.total_tokens:.6g}",
    }


def run_tags(config: RunConfig, start: dict[str, Any]) -> dict[str, Any]:
    """What one searches runs by; start: the run folder's line of it."""
    axes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    sizes = [start["parallel"].get(axis, 1) for axis in axes]
    sizes.append(start["world_size"] // math.prod(sizes))
    layout = [f"{name}{size}" for name, size in zip(("tp", "pp", "cp", "dp"), sizes, strict=True)]
    tags = {
        "recipe_hash": recipe_hash(config),
        "git_commit": start["git_commit"] or "unknown",
        "uniform_ratio": config.diffusion.uniform_ratio,
        "layout": "-".join(layout),
    }
    return tags if start.get("slurm_job_id") is None else tags | {"slurm_job_id": start["slurm_job_id"]}
