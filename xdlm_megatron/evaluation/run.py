"""The verb `sample`: a recipe and a checkpoint in, text out."""

from __future__ import annotations

import math
from typing import Any

from xdlm_megatron.config.derive import run_folder
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_noise, build_schedule
from xdlm_megatron.data.tokenizer import Tokenizer, load_tokenizer
from xdlm_megatron.evaluation.generation import (
    SampleOptions,
    Samples,
    build_denoiser,
    generate,
    observe,
)
from xdlm_megatron.evaluation.restore import choose_checkpoint, restored, which_weights
from xdlm_megatron.evaluation.samples_on_disk import (
    describe_samples,
    mean_of,
    samples_name,
    write_samples,
    write_traces,
)
from xdlm_megatron.evaluation.trace import print_trace
from xdlm_megatron.parallel.kernel_choice import choose_kernels_together


def sample(
    config: RunConfig, options: SampleOptions, checkpoint: str | None = None, use_ema: bool = True
) -> Samples:
    """Prints samples of a checkpoint, and a trace of the first if asked for; `samples/` of the run folder
    gets them with all that made them.
    """
    path = choose_checkpoint(config, checkpoint)
    tokenizer = load_tokenizer(config.data.tokenizer)
    noise, schedule = build_noise(config), build_schedule(config.diffusion)
    given = (tokenizer.encode(text) if text else [] for text in (options.prompt, options.suffix))
    with restored(config, path, use_ema) as (mesh, chunks, step):
        kernels = choose_kernels_together(config.train.kernels, mesh)
        observed_S = observe(config.data.seq_length, *given, mesh.device)
        samples = generate(
            build_denoiser(chunks, mesh),
            options,
            config.sampling,
            noise,
            schedule,
            observed_S,
            config.train.micro_batch_size,
            kernels.draw,
        )
        if mesh.is_main:
            print(f"tokens drawn by {kernels.reason}")
            records = describe_samples(tokenizer, observed_S, samples)
            title = f"{path} (step {step}, {which_weights(use_ema)})"
            _print_samples(tokenizer, config, options, samples, records, title)
            name = samples_name(config.sampling, options.seed)
            file = run_folder(config) / "samples" / f"{path.name}-{'ema' if use_ema else 'plain'}-{name}"
            write_samples(file, config, options, path, step, use_ema, records)
            if options.trace_frames:
                write_traces(file, tokenizer, observed_S, samples, title, _facts(config, records[:1]))
            beside = ", and its trace as .png and .html" if options.trace_frames else ""
            print(f"{file}{beside}", flush=True)
    return samples


def _print_samples(
    tokenizer: Tokenizer,
    config: RunConfig,
    options: SampleOptions,
    samples: Samples,
    records: list[dict[str, Any]],
    title: str,
) -> None:
    print(f"{title}: {_facts(config, records)}")
    if options.trace_frames:
        print_trace(
            [ids.cpu().numpy() for _, ids in samples.snapshots],
            [t for t, _ in samples.snapshots],
            tokenizer.token_strings,
            tokenizer.mask_id,
            max_frames=options.trace_frames,
        )
    for index, record in enumerate(records, start=1):
        print(f"--- sample {index}: unigram entropy {record['unigram_entropy']:.3f} nats per token")
        print(record["text"], flush=True)


def _facts(config: RunConfig, records: list[dict[str, Any]]) -> str:
    """One line on how the samples were made, means over them."""
    calls, per_step, tau = (
        mean_of(records, name) for name in ("network_calls", "parallelism", "kendall_tau")
    )
    order = "" if math.isnan(tau) else f", order {tau:+.2f} (1: left to right)"
    return f"{config.sampling.kind}, {calls:.4g} network calls, {per_step:.3g} tokens a step{order}"
