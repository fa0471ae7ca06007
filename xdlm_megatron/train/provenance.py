"""What a run folder tells of where it came from, and what a resume may not change."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from xdlm_megatron import __version__
from xdlm_megatron.config.load import ConfigError, dump_recipe, load_recipe, to_tree
from xdlm_megatron.config.schema import RunConfig

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.jsonl"

# A resume that changes one of these would go on as another experiment.
FIXED_FIELDS = (
    "run.seed",
    "diffusion",
    "model",
    "precision",
    "data",
    "optimizer",
    "lr_schedule",
    "train.num_steps",
    "train.global_batch_size",
    "train.rampup_batch_size",
)
# Where the same data lies, and how its vocabulary is padded, may change with the machine or the layout.
FREE_FIELDS = (
    "data.train_prefix",
    "data.valid_prefix",
    "data.tokenizer",
    "data.make_vocab_size_divisible_by",
)


def write_recipe(folder: Path, config: RunConfig) -> None:
    """The resolved recipe, before the first step."""
    aside = folder / f"{RECIPE}.tmp"
    aside.write_text(dump_recipe(config))
    aside.rename(folder / RECIPE)  # whole or not at all: a resume reads it


def record_start(folder: Path, config: RunConfig, step: int, world_size: int) -> None:
    """One line for every start of the run: step, layout, package versions, git commit."""
    start = {
        "step": step,
        "world_size": world_size,
        "parallel": to_tree(config)["parallel"],
        "xdlm_megatron": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "megatron-core", "numpy", "mlflow-skinny")},
    }
    with (folder / ENVIRONMENT).open("a") as file:
        file.write(json.dumps(start) + "\n")


def check_same_experiment(folder: Path, config: RunConfig) -> None:
    """Compares the recipe with the one that the run folder was started with.

    Raises:
        ConfigError: maths, model, data or seed differ; names each field with both values.
    """
    before, now = _flat(load_recipe(folder / RECIPE)), _flat(config)
    changed = [
        f"  {name}: was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and name not in FREE_FIELDS
        and any(name == fixed or name.startswith(fixed + ".") for fixed in FIXED_FIELDS)
    ]
    if changed:
        cure = "change them back, or start a new run by another run.name"
        raise ConfigError(
            "\n".join([f"{folder}: the recipe is not the one this run began with; {cure}", *changed])
        )


def recipe_hash(config: RunConfig) -> str:
    """Short hash of the resolved recipe."""
    return hashlib.sha256(dump_recipe(config).encode()).hexdigest()[:12]


def git_commit() -> str | None:
    """Commit of the source tree, with -dirty where it has changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", to_tree(config))
    return flat
