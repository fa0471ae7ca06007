"""The verb `evaluate`: a recipe and a checkpoint in, figures with their errors out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xdlm_megatron.checkpoint.integrity import fingerprint
from xdlm_megatron.config.derive import run_folder
from xdlm_megatron.config.load import to_tree
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_noise, build_valid_samples
from xdlm_megatron.evaluation.bound import Bound, BoundEvaluator, Evaluated, TimedObjective
from xdlm_megatron.evaluation.nelbo import Estimate, build_evaluator
from xdlm_megatron.evaluation.report import draw_by_time, write_by_time, write_record
from xdlm_megatron.evaluation.restore import choose_checkpoint, restored, which_weights
from xdlm_megatron.evaluation.text_stats import unigram_entropy
from xdlm_megatron.parallel.kernel_choice import choose_kernels_together


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate; the fields are the command line's. discrete_steps: of a chain's bound; None: none."""

    discrete_steps: int | None = None


def evaluate(
    config: RunConfig,
    options: EvaluateOptions | None = None,
    checkpoint: str | None = None,
    use_ema: bool = True,
) -> Evaluated:
    """Prints bounds on the held-out text of a checkpoint and writes them to `evaluations/` of the run folder.

    Raises:
        DataError, CheckpointError: the text or the checkpoint is missing or does not fit the recipe.
    """
    options = options or EvaluateOptions()
    path = choose_checkpoint(config, checkpoint)
    with restored(config, path, use_ema) as (mesh, chunks, step):
        kernels = choose_kernels_together(config.train.kernels, mesh)
        objective = TimedObjective(
            build_noise(config),
            mesh,
            fuse_head=config.train.fuse_head,
            ops=kernels.row_ops,
            t_min=config.diffusion.t_min,
        )
        evaluator = build_evaluator(config, mesh, objective, label="held-out text")
        if mesh.is_main:
            print(f"loss by {kernels.reason}\n{path} (step {step}, {which_weights(use_ema)})", flush=True)
        found = BoundEvaluator(evaluator, options.discrete_steps)(chunks)
        if mesh.is_main:
            record = _checkpoint_record(config, path, step, use_ema) | _settings(config, options)
            name = f"{path.name}-{'ema' if use_ema else 'plain'}"
            _report(config, name, record, found, unigram_entropy(_held_out_ids(config)))
    return found


def _held_out_ids(config: RunConfig) -> np.ndarray:
    """The ids that the evaluation scores."""
    samples = build_valid_samples(config, torch.device("cpu"))
    clean = samples.clean(np.arange(samples.index.num_samples))
    return clean.x0_BS[clean.scored_BS].numpy()


def _checkpoint_record(config: RunConfig, path: Path, step: int, use_ema: bool) -> dict[str, Any]:
    """What every file of results says of the model that they are of."""
    return {
        "checkpoint": path.name,
        "checkpoint_hash": fingerprint(path),
        "step": step,
        "ema": use_ema,
        "diffusion": to_tree(config)["diffusion"],
        "seed": config.run.seed,
    }


def _settings(config: RunConfig, options: EvaluateOptions) -> dict[str, Any]:
    return {"num_noise_draws": config.evaluation.num_noise_draws, "settings": asdict(options)}


def _report(config: RunConfig, name: str, record: dict[str, Any], found: Evaluated, entropy: float) -> None:
    window, low = found.window, config.diffusion.t_min
    lines = [
        _bound_line("strict bound", found.bound),
        "    = " + " + ".join(f"{part} {_with_error(value)}" for part, value in found.bound.parts.items()),
        f"  held-out NELBO {_with_error(Estimate(window.nelbo_per_token, window.standard_error))} nats per "
        f"token, perplexity {window.perplexity:.2f}: the paper's, t in ({low:g}, 1) without the ends",
    ]
    if found.discrete is not None:
        lines.append(_bound_line(f"bound of {found.discrete.num_steps} sampling steps", found.discrete))
    lines.append(
        f"  over {window.num_sequences} sequences, {window.num_tokens} tokens; "
        f"their unigram entropy is {entropy:.4f} nats per token"
    )
    print("\n".join(lines), flush=True)
    record |= {
        "bound": _bound_record(found.bound),
        "discrete": None if found.discrete is None else _bound_record(found.discrete),
        "nelbo_per_token": window.nelbo_per_token,
        "standard_error": window.standard_error,
        "perplexity": window.perplexity,
        "bits_per_byte": window.bits_per_byte,
        "num_sequences": window.num_sequences,
        "num_tokens": window.num_tokens,
        "unigram_entropy": entropy,
    }
    folder = run_folder(config) / "evaluations"
    write_record(folder / f"{name}.json", record)
    write_by_time(folder / f"{name}-by_time.csv", found.by_time)
    draw_by_time(folder / f"{name}-by_time.png", found.by_time, f"{config.run.name}, {name}")
    print(f"  written to {folder / name}.json, -by_time.csv, -by_time.png", flush=True)


def _with_error(value: Estimate) -> str:
    error = "" if value.standard_error == 0 else f" +- {value.standard_error:.4f}"
    return f"{value.mean:.4f}{error}"


def _bound_line(name: str, bound: Bound) -> str:
    bits = "" if bound.bits_per_byte is None else f", {bound.bits_per_byte:.4f} bits per byte"
    return f"  {name} {_with_error(bound.total)} nats per token, perplexity {bound.perplexity:.2f}{bits}"


def _bound_record(bound: Bound) -> dict[str, Any]:
    error = bound.total.standard_error
    in_bits = None if bound.bits_per_byte is None else bound.bits_per_byte * error / bound.total.mean
    return {
        "num_steps": bound.num_steps,
        "nats_per_token": bound.total.mean,
        "standard_error": error,
        "perplexity": bound.perplexity,
        "perplexity_standard_error": bound.perplexity * error,
        "bits_per_byte": bound.bits_per_byte,
        "bits_per_byte_standard_error": in_bits,
        "parts": {name: value._asdict() for name, value in bound.parts.items()},
    }
