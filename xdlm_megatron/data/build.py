"""Recipe -> noised samples, after checking that data, tokenizer and recipe speak of the same vocabulary."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from xdlm_megatron.config.schema import Data, Diffusion, RunConfig
from xdlm_megatron.data.batch import Index, NoisedSamples
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.indexed import load_manifest
from xdlm_megatron.data.packing import PackedDataset
from xdlm_megatron.data.sampler import ShuffledIndex, SpreadIndex
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import SCHEDULES, Schedule

WHOLE = slice(None)


def build_noise(config: RunConfig) -> StationaryNoise:
    """The recipe's noise kernel."""
    return StationaryNoise(config.diffusion.uniform_ratio, config.data.vocab_size, config.data.mask_id)


def build_schedule(section: Diffusion) -> Schedule:
    """The recipe's alpha(t)."""
    return SCHEDULES[section.schedule](alpha_min=section.alpha_min)


def build_train_samples(config: RunConfig, device: torch.device, positions: slice = WHOLE) -> NoisedSamples:
    """Training samples in shuffled order, with training's noise; `positions` of each. Raises DataError."""
    _check_vocabulary(config.data, config.data.train_prefix)
    dataset = PackedDataset(config.data.train_prefix, config.data.seq_length)
    index = ShuffledIndex(len(dataset), config.run.seed)
    return _noised(config, dataset, index, (Stream.TIME, Stream.NOISE), device, positions)


def build_valid_samples(config: RunConfig, device: torch.device, positions: slice = WHOLE) -> NoisedSamples:
    """Held-out samples, spread over the text; ids past their number start over with other noise.

    Raises:
        DataError: data.valid_prefix is missing or does not fit the recipe.
    """
    if config.data.valid_prefix is None:
        raise DataError("data.valid_prefix is null, and evaluation needs held-out text; set it to a prefix")
    _check_vocabulary(config.data, config.data.valid_prefix)
    dataset = PackedDataset(config.data.valid_prefix, config.data.seq_length)
    index = SpreadIndex(min(len(dataset), config.evaluation.num_sequences), len(dataset))
    return _noised(config, dataset, index, (Stream.EVAL_TIME, Stream.EVAL_NOISE), device, positions)


def _noised(
    config: RunConfig,
    dataset: PackedDataset,
    index: Index,
    streams: tuple[Stream, Stream],
    device: torch.device,
    positions: slice,
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
    )


def _check_vocabulary(data: Data, prefix: str) -> None:
    manifest = load_manifest(prefix)
    for knob, given, found in (
        ("data.vocab_size", data.vocab_size, manifest.vocab_size),
        ("data.mask_id", data.mask_id, manifest.mask_id),
    ):
        if given != found:
            raise DataError(
                f"{knob}={given} must be {found}, as {prefix}.json says; correct the recipe or the prefix"
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
