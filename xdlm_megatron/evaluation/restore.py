"""A trained model, ready to evaluate or to sample from, under any layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core.transformer.module import MegatronModule

from xdlm_megatron.checkpoint.contents import load_model_state, model_state
from xdlm_megatron.checkpoint.reader import (
    CheckpointError,
    check_whole,
    find_latest,
    is_checkpoint,
    load_checkpoint,
    load_plain_values,
)
from xdlm_megatron.config.derive import derive, run_folder
from xdlm_megatron.config.gpu_rules import TRAINING_MCORE_FIELDS
from xdlm_megatron.config.identity import changed_network
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.model.build import build_model, unwrap
from xdlm_megatron.optim.ema import load_into_parameters
from xdlm_megatron.parallel.mesh import Mesh, open_mesh_for
from xdlm_megatron.parallel.process_modes import deterministic


def choose_checkpoint(config: RunConfig, given: str | None) -> Path:
    """The checkpoint to read: the one given, or the run folder's latest. Raises CheckpointError."""
    if given is not None:
        path = Path(given)
        if not is_checkpoint(path):
            raise CheckpointError(
                f"--checkpoint {given} is not a checkpoint folder; it is named like step_00001000"
            )
        return path
    latest = find_latest(run_folder(config) / "checkpoints")
    if latest is None:
        raise CheckpointError(
            f"{run_folder(config)} has no checkpoint yet; train first, or give --checkpoint"
        )
    return latest


def which_weights(use_ema: bool) -> str:
    """For a reader."""
    return "averaged weights" if use_ema else "plain weights"


@contextmanager
def restored(
    config: RunConfig, path: Path, use_ema: bool
) -> Iterator[tuple[Mesh, list[MegatronModule], int]]:
    """The recipe's processes with the checkpoint's model: mesh, chunks and step. Errors of restore_model."""
    mode = deterministic(bool(config.model.mcore.get("deterministic_mode")))
    with mode, open_mesh_for(config.parallel) as mesh:
        derive(config, mesh.world_size)  # refuses a layout that does not fit the processes
        chunks, step = restore_model(config, mesh, path, use_ema)
        yield mesh, chunks, step


def restore_model(
    config: RunConfig, mesh: Mesh, path: Path, use_ema: bool
) -> tuple[list[MegatronModule], int]:
    """The model chunks with the checkpoint's weights (their average with `use_ema`), and its step.

    Raises:
        CheckpointError: a file is damaged, the average is asked for and was never kept, or the model is
            another one.
    """
    check_whole(path, mesh)
    plain = load_plain_values(path)
    _check_same_model(config, plain, path)
    if use_ema and "ema_updates" not in plain:
        raise CheckpointError(f"{path} holds no averaged weights; add --no-ema")
    chunks = build_model(_without_training(config), mesh, draw_weights=False)
    bare = [unwrap(chunk) for chunk in chunks]
    state = model_state(bare, mesh.groups)
    if use_ema:
        parameters = [p for chunk in bare for p in chunk.parameters()]
        load_into_parameters(state, parameters, lambda ema: load_checkpoint(path, {"ema": ema}, mesh)["ema"])
    else:
        values = load_checkpoint(path, state, mesh)
        load_model_state(bare, values)
    return chunks, plain["train_state"]["step"]


def _without_training(config: RunConfig) -> RunConfig:
    """Without what only a training step can use: it asks for a batch of its size, or for a backward pass."""
    mcore = {name: value for name, value in config.model.mcore.items() if name not in TRAINING_MCORE_FIELDS}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mcore=mcore),
        precision=dataclasses.replace(config.precision, fp8_param_gather=False),
    )


def _check_same_model(config: RunConfig, plain: dict, path: Path) -> None:
    """Refuses another network or another noise; what was converted was trained with no noise of ours."""
    with_noise = "converted_from" not in plain
    changed = changed_network(plain["recipe"], config, with_noise)
    if changed:
        there = ", ".join(f"{name}={value!r}" for name, value, _ in changed)
        here = ", ".join(repr(value) for _, _, value in changed)
        raise CheckpointError(
            f"{path} was trained with {there} and the recipe says {here}; use the run folder's recipe.yaml"
        )
