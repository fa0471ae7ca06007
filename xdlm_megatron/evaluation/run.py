"""The verbs `evaluate` and `sample`: a recipe and a checkpoint in, figures or text out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule

from xdlm_megatron.config.derive import derive, run_folder
from xdlm_megatron.config.load import to_tree
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_noise, build_schedule, build_valid_samples
from xdlm_megatron.data.tokenizer import Tokenizer, load_tokenizer
from xdlm_megatron.evaluation.generation import (
    SampleOptions,
    Samples,
    build_denoiser,
    generate,
    observe,
)
from xdlm_megatron.evaluation.nelbo import NelboResult, build_evaluator
from xdlm_megatron.evaluation.restore import choose_checkpoint, restore_model
from xdlm_megatron.evaluation.text_stats import unigram_entropy
from xdlm_megatron.evaluation.trace import print_trace
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.kernel_choice import choose_kernels_together
from xdlm_megatron.parallel.mesh import Mesh, open_mesh_for


def evaluate(config: RunConfig, checkpoint: str | None = None, use_ema: bool = True) -> NelboResult:
    """Prints the held-out NELBO of a checkpoint and writes it to `evaluations/` of the run folder."""
    path = choose_checkpoint(config, checkpoint)
    with _restored(config, path, use_ema) as (mesh, chunks, step):
        kernels = choose_kernels_together(config.train.kernels, mesh)
        objective = Objective(
            build_noise(config), mesh, fuse_head=config.train.fuse_head, ops=kernels.row_ops
        )
        evaluator = build_evaluator(config, mesh, objective)
        if mesh.is_main:
            print(f"loss by {kernels.reason}", flush=True)
        result = evaluator(chunks)
        if mesh.is_main:
            entropy = unigram_entropy(_held_out_ids(config))
            _report_evaluation(config, path, step, use_ema, result, entropy)
    return result


def sample(
    config: RunConfig, options: SampleOptions, checkpoint: str | None = None, use_ema: bool = True
) -> Samples:
    """Prints samples of a checkpoint with their unigram entropy, and a trace of the first if asked for."""
    path = choose_checkpoint(config, checkpoint)
    tokenizer = load_tokenizer(config.data.tokenizer)
    noise, schedule = build_noise(config), build_schedule(config.diffusion)
    given = (tokenizer.encode(text) if text else [] for text in (options.prompt, options.suffix))
    with _restored(config, path, use_ema) as (mesh, chunks, step):
        kernels = choose_kernels_together(config.train.kernels, mesh)
        samples = generate(
            build_denoiser(chunks, mesh),
            options,
            config.sampling,
            noise,
            schedule,
            observe(config.data.seq_length, *given, mesh.device),
            config.train.micro_batch_size,
            kernels.draw_shard,
        )
        if mesh.is_main:
            print(f"tokens drawn by {kernels.reason}")
            _report_samples(tokenizer, config, options, samples, f"{path} (step {step}, {_weights(use_ema)})")
    return samples


def _held_out_ids(config: RunConfig) -> np.ndarray:
    """The ids that the evaluation scores."""
    samples = build_valid_samples(config, torch.device("cpu"))
    ids = np.arange(samples.index.num_samples)
    batch = samples.build(ids, ids, len(ids))
    return batch.x0_BS[batch.scored_BS].numpy()


@contextmanager
def _restored(
    config: RunConfig, path: Path, use_ema: bool
) -> Iterator[tuple[Mesh, list[MegatronModule], int]]:
    with open_mesh_for(config.parallel) as mesh:
        derive(config, mesh.world_size)  # refuses a layout that does not fit the processes
        chunks, step = restore_model(config, mesh, path, use_ema)
        yield mesh, chunks, step


def _weights(use_ema: bool) -> str:
    return "averaged weights" if use_ema else "plain weights"


def _report_evaluation(
    config: RunConfig, path: Path, step: int, use_ema: bool, result: NelboResult, entropy: float
) -> None:
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits per byte"
    print(
        f"{path} (step {step}, {_weights(use_ema)})\n"
        f"  held-out NELBO {result.nelbo_per_token:.4f} +- {result.standard_error:.4f} nats per token, "
        f"perplexity {result.perplexity:.2f}{bits}\n"
        f"  over {result.num_sequences} sequences, {result.num_tokens} tokens; "
        f"their unigram entropy is {entropy:.4f} nats per token",
        flush=True,
    )
    record = {
        "checkpoint": path.name,
        "step": step,
        "ema": use_ema,
        "diffusion": to_tree(config)["diffusion"],
        "nelbo_per_token": result.nelbo_per_token,
        "standard_error": None if math.isnan(result.standard_error) else result.standard_error,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "bits_per_byte": result.bits_per_byte,
        "num_sequences": result.num_sequences,
        "num_noise_draws": config.evaluation.num_noise_draws,
        "seed": config.run.seed,
        "unigram_entropy": entropy,
    }
    folder = run_folder(config) / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{path.name}-{'ema' if use_ema else 'plain'}.json"
    (folder / name).write_text(json.dumps(record, indent=2) + "\n")


def _report_samples(
    tokenizer: Tokenizer, config: RunConfig, options: SampleOptions, samples: Samples, title: str
) -> None:
    steps, calls = samples.steps.double().mean(), samples.evaluations.double().mean()
    print(f"{title}: {config.sampling.kind}, {steps:.4g} steps, {calls:.4g} network calls a sample")
    if options.trace_frames:
        print_trace(
            [ids.cpu().numpy() for _, ids in samples.snapshots],
            [t for t, _ in samples.snapshots],
            tokenizer.token_strings,
            tokenizer.mask_id,
            max_frames=options.trace_frames,
        )
    for index, ids in enumerate(samples.ids.cpu().numpy()):
        print(f"--- sample {index + 1}: unigram entropy {unigram_entropy(ids):.3f} nats per token")
        print(tokenizer.decode(ids.tolist()), flush=True)
