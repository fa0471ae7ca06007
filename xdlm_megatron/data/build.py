"""Recipe -> noised samples, after checking that data, tokenizer and recipe speak of the same vocabulary."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from xdlm_megatron.config.schema import Data, Diffusion, RunConfig
from xdlm_megatron.data.batch import DocumentRules, Index, NoisedSamples
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.indexed import load_manifest
from xdlm_megatron.data.packing import PackedDataset, Packing, PaddedDataset
from xdlm_megatron.data.sampler import ShuffledIndex, SpreadIndex
from xdlm_megatron.diffusion.counter_rng import Stream, compiled_philox, philox
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import SCHEDULES, Schedule

WHOLE = slice(None)


def build_noise(config: RunConfig) -> StationaryNoise:
    """The recipe's noise kernel."""
    words = compiled_philox() if config.train.compile else philox
    ratio, data = config.diffusion.uniform_ratio, config.data
    return StationaryNoise(ratio, data.vocab_size, data.mask_id, words=words)


def build_schedule(section: Diffusion) -> Schedule:
    """The recipe's alpha(t)."""
    return SCHEDULES[section.schedule](alpha_min=section.alpha_min)


def build_train_samples(config: RunConfig, device: torch.device, positions: slice = WHOLE) -> NoisedSamples:
    """Training samples in shuffled order, with training's noise; `positions` of each. Raises DataError."""
    dataset = _open_dataset(config.data, config.data.train_prefix)
    index = ShuffledIndex(len(dataset), config.run.seed)
    rules = _document_rules(config, config.data.random_length_fraction)
    return _noised(config, dataset, index, (Stream.TIME, Stream.NOISE), device, positions, rules)


def build_valid_samples(config: RunConfig, device: torch.device, positions: slice = WHOLE) -> NoisedSamples:
    """Held-out samples, spread over the text; ids past their number start over with other noise.

    Raises:
        DataError: data.valid_prefix is missing or does not fit the recipe.
    """
    if config.data.valid_prefix is None:
        raise DataError("data.valid_prefix is null, and evaluation needs held-out text; set it to a prefix")
    dataset = _open_dataset(config.data, config.data.valid_prefix)
    index = SpreadIndex(min(len(dataset), config.evaluation.num_sequences), len(dataset))
    rules = _document_rules(config, random_length_fraction=0.0)
    return _noised(config, dataset, index, (Stream.EVAL_TIME, Stream.EVAL_NOISE), device, positions, rules)


def _document_rules(config: RunConfig, random_length_fraction: float) -> DocumentRules:
    return DocumentRules(
        separate=config.data.packing != "stream",
        time_per_document=config.diffusion.time_per == "document",
        clean_prompts=config.data.clean_prompts,
        random_length_fraction=random_length_fraction,
    )


def _noised(
    config: RunConfig,
    dataset: Packing,
    index: Index,
    streams: tuple[Stream, Stream],
    device: torch.device,
    positions: slice,
    rules: DocumentRules,
) -> NoisedSamples:
    return NoisedSamples(
        dataset=dataset,
        index=index,
        noise=build_noise(config),
        schedule=build_schedule(config.diffusion),
        seed=config.run.seed,
        t_min=config.diffusion.t_min,
        streams=streams,
        device=device,
        positions=positions,
        rules=rules,
    )


def _open_dataset(data: Data, prefix: str) -> Packing:
    _check_manifest(data, prefix)
    if data.packing == "padded":
        return PaddedDataset(prefix, data.seq_length, whole=data.clean_prompts)
    return PackedDataset(prefix, data.seq_length)


def _check_manifest(data: Data, prefix: str) -> None:
    manifest = load_manifest(prefix)
    if data.clean_prompts and manifest.prompt_tokens is None:
        raise DataError(
            f"data.clean_prompts=true needs documents with prompts, and {prefix} has none; "
            "preprocess with --prompt-key, or turn it off"
        )
    for knob, given, found in (
        ("data.vocab_size", data.vocab_size, manifest.vocab_size),
        ("data.mask_id", data.mask_id, manifest.mask_id),
    ):
        if given != found:
            rows = knob == "data.vocab_size" and given > found
            raise DataError(
                f"{knob}={given} must be {found}, as {prefix}.json says; correct the recipe or the prefix"
                + (
                    f" (a model with more rows than tokens: preprocess with --vocab-size {given})"
                    if rows
                    else ""
                )
            )
    tokenizer = Path(data.tokenizer)
    if not tokenizer.is_file():
        raise DataError(
            f"data.tokenizer={data.tokenizer}: no such file; give the tokenizer that made {prefix}"
        )
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
        raise DataError(
            f"data.tokenizer={data.tokenizer} is not the file that made {prefix} ({manifest.tokenizer}); "
            "give that one, or preprocess again"
        )
