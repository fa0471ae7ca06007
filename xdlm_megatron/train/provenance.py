"""What a run folder tells of where it came from, and what a resume may not change."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from xdlm_megatron import __version__
from xdlm_megatron.checkpoint.integrity import MANIFEST
from xdlm_megatron.config.identity import changed_fields
from xdlm_megatron.config.load import ConfigError, dump_recipe, load_recipe, to_tree
from xdlm_megatron.config.record import ENVIRONMENT
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.indexed import load_manifest

RECIPE = "recipe.yaml"
DATA = "data.json"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "numpy", "mlflow-skinny")


def write_recipe(folder: Path, config: RunConfig) -> None:
    """The resolved recipe, before the first step."""
    _write_whole(folder / RECIPE, dump_recipe(config))


def write_data(folder: Path, config: RunConfig) -> None:
    """What the data are, by their manifests. Comes before the recipe: a run without it has lost it."""
    _write_whole(folder / DATA, json.dumps(_describe_data(config), indent=2) + "\n")


def record_start(
    folder: Path, config: RunConfig, step: int, world_size: int, initial: Path | None = None
) -> None:
    """One line for every start of the run: step, layout, job, package versions, git commit.

    initial: the checkpoint that this start took its weights from; its manifest has their checksums.
    """
    start = {
        "step": step,
        "world_size": world_size,
        "init_from": initial
        and {
            "checkpoint": str(initial),
            "manifest_sha256": hashlib.sha256((initial / MANIFEST).read_bytes()).hexdigest(),
        },
        "parallel": to_tree(config)["parallel"],
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "precision": to_tree(config)["precision"],
        "xdlm_megatron": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    with (folder / ENVIRONMENT).open("a") as file:
        file.write(json.dumps(start) + "\n")


def check_same_experiment(folder: Path, config: RunConfig) -> None:
    """Compares the recipe with the one that the run folder was started with.

    Raises:
        ConfigError: maths, model, data or seed differ; names each field with both values.
    """
    changed = [
        f"  {name}: was {before!r}, now {now!r}"
        for name, before, now in changed_fields(load_recipe(folder / RECIPE), config)
    ]
    if changed:
        cure = "change them back, or start a new run by another run.name"
        raise ConfigError(
            "\n".join([f"{folder}: the recipe is not the one this run began with; {cure}", *changed])
        )


def check_same_data(folder: Path, config: RunConfig) -> None:
    """Compares the checksums of the prefixes' manifests with those that the run folder was started with.

    Held-out text counts too: the run's losses on it would else be two curves in one. `evaluate` takes any.

    Raises:
        ConfigError: training or held-out data differ; names each prefix with both checksums.
        DataError: a prefix has no manifest.
    """
    try:
        before = json.loads((folder / DATA).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder / DATA}, which says what data this run is on, is gone; put it back, or copy it from "
            "another run on the same data"
        ) from None
    now = _describe_data(config)
    changed = [
        f"  data.{name}: was {_show(before[name])}, now {_show(now[name])}"
        for name in now
        if (before[name] and before[name]["sha256"]) != (now[name] and now[name]["sha256"])
    ]
    if changed:
        cure = "give the data it began with, or start a new run by another run.name"
        if not changed[0].startswith("  data.train"):
            cure += "; other held-out text goes to `evaluate`"
        raise ConfigError(
            "\n".join([f"{folder}: the data are not those this run began with; {cure}", *changed])
        )


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


def _write_whole(path: Path, text: str) -> None:
    """Whole or not at all: a resume reads it."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text)
    aside.rename(path)


def _describe_data(config: RunConfig) -> dict[str, dict[str, Any] | None]:
    """{"train_prefix": {"prefix": ..., "sha256": {"bin": ..., "idx": ...}}, "valid_prefix": same or None}."""
    return {
        name: None if prefix is None else {"prefix": prefix, "sha256": load_manifest(prefix).sha256}
        for name, prefix in (
            ("train_prefix", config.data.train_prefix),
            ("valid_prefix", config.data.valid_prefix),
        )
    }


def _show(data: dict[str, Any] | None) -> str:
    if data is None:
        return "null"
    sums = ", ".join(f"{kind} {checksum[:12]}" for kind, checksum in sorted(data["sha256"].items()))
    return f"{data['prefix']} (sha256 of {sums})"
