"""The verb `sample`: a recipe and a checkpoint in, text out."""

from __future__ import annotations

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
from xdlm_megatron.evaluation.text_stats import unigram_entropy
from xdlm_megatron.evaluation.trace import print_trace
from xdlm_megatron.parallel.kernel_choice import choose_kernels_together


def sample(
    config: RunConfig, options: SampleOptions, checkpoint: str | None = None, use_ema: bool = True
) -> Samples:
    """Prints samples of a checkpoint with their unigram entropy, and a trace of the first if asked for."""
    path = choose_checkpoint(config, checkpoint)
    tokenizer = load_tokenizer(config.data.tokenizer)
    noise, schedule = build_noise(config), build_schedule(config.diffusion)
    given = (tokenizer.encode(text) if text else [] for text in (options.prompt, options.suffix))
    with restored(config, path, use_ema) as (mesh, chunks, step):
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
            _report_samples(
                tokenizer, config, options, samples, f"{path} (step {step}, {which_weights(use_ema)})"
            )
    return samples


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
