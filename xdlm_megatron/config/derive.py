"""Arithmetic on a recipe: what follows from its knobs. Computed where needed, never written back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xdlm_megatron.config.schema import Data, RunConfig, Train

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Derived:
    """What a recipe amounts to on `world_size` processes; a step is one after the batch has grown."""

    world_size: int
    data_parallel_size: int
    num_microbatches: int
    tokens_per_step: int
    total_tokens: int
    padded_vocab_size: int
    num_query_groups: int
    kv_channels: int
    num_parameters: int
    num_non_embedding_parameters: int
    flops_per_token: float
    weight_bytes: int


def run_folder(config: RunConfig) -> Path:
    """Where everything that the run writes lies."""
    return Path(config.run.output_dir) / config.run.name


def padded_vocab_size(config: RunConfig) -> int:
    """vocab_size rounded up to a multiple of make_vocab_size_divisible_by * tensor_model_parallel_size."""
    data = config.data
    return pad_vocab_size(
        data.vocab_size, data.make_vocab_size_divisible_by, config.parallel.tensor_model_parallel_size
    )


def pad_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Rounded up, so that every tensor-parallel rank has equally many rows in multiples of divisible_by."""
    unit = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // unit) * unit


def keeps_documents_apart(data: Data) -> bool:
    """Whether attention is masked: it stays within documents, or off positions past a random length."""
    return data.packing != "stream" or data.random_length_fraction > 0


def num_query_groups(config: RunConfig) -> int:
    return config.model.num_query_groups or config.model.num_attention_heads


def kv_channels(config: RunConfig) -> int:
    return config.model.kv_channels or config.model.hidden_size // config.model.num_attention_heads


def model_parallel_size(config: RunConfig) -> int:
    """Processes that hold one replica of the model or of a sequence."""
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def data_parallel_size(
    world_size: int,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    context_parallel_size: int = 1,
) -> int:
    """Replicas of the model among `world_size` processes. Raises ValueError where the layout does not fit."""
    size = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if world_size < 1 or world_size % size:
        raise ValueError(
            f"world size {world_size} must be a multiple of parallel.tensor_model_parallel_size * "
            f"parallel.pipeline_model_parallel_size * parallel.context_parallel_size = "
            f"{tensor_model_parallel_size} * {pipeline_model_parallel_size} * {context_parallel_size} = "
            f"{size}; start {size} or {2 * size} processes (torchrun "
            f"--nproc-per-node {size}), or change the layout"
        )
    return world_size // size


def head_fusion(config: RunConfig) -> Literal["auto", "always", "never"]:
    """train.fuse_head; never where gradients are reduced in backward: a fused head makes its own before."""
    return "never" if config.parallel.overlap_grad_reduce else config.train.fuse_head


def num_layer_parameters(config: RunConfig) -> int:
    """Parameters of one transformer layer: attention, SwiGLU, norms."""
    model, head = config.model, kv_channels(config)
    query, key_value = model.num_attention_heads * head, num_query_groups(config) * head
    attention = model.hidden_size * (query + 2 * key_value) + query * model.hidden_size
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    norms = 2 * model.hidden_size + (2 * head if model.qk_layernorm else 0)
    return attention + mlp + norms


def num_parameters(config: RunConfig) -> int:
    """All parameters of the built model, vocabulary padding included."""
    embeddings = 1 if config.model.share_embeddings_and_output_weights else 2
    return (
        config.model.num_layers * num_layer_parameters(config)
        + config.model.hidden_size  # final norm
        + embeddings * padded_vocab_size(config) * config.model.hidden_size
    )


def flops_per_token(config: RunConfig) -> float:
    """Training FLOPs (forward and backward) per token.

    Six per weight of a matrix, head included and embedding lookup free, plus 12 * L * d_attention * S for
    attention: full (bidirectional), so the causal half does not apply.
    """
    model, head = config.model, kv_channels(config)
    norms = 2 * model.hidden_size + (2 * head if model.qk_layernorm else 0)
    matrices = model.num_layers * (num_layer_parameters(config) - norms)
    attention = 12 * model.num_layers * model.num_attention_heads * head * config.data.seq_length
    return 6.0 * (matrices + config.data.vocab_size * model.hidden_size) + attention


def batch_size_at(train: Train, consumed_samples: int) -> int:
    """Sequences in the step that starts after `consumed_samples`: a function of that number alone.

    A ramp-up raises it by its increment after each of (global_batch_size - start) / increment equal parts of
    its samples.
    """
    if train.rampup_batch_size is None:
        return train.global_batch_size
    start, increment, samples = train.rampup_batch_size
    num_increments = (train.global_batch_size - start) // increment
    return min(start + increment * (consumed_samples * num_increments // samples), train.global_batch_size)


def consumed_after(train: Train, num_steps: int) -> int:
    """Samples that the first `num_steps` steps take."""
    consumed = 0
    while num_steps > 0:
        size = batch_size_at(train, consumed)
        steps = num_steps
        if train.rampup_batch_size is not None and size < train.global_batch_size:
            start, increment, samples = train.rampup_batch_size
            num_increments = (train.global_batch_size - start) // increment
            raised_at = -(-((size - start) // increment + 1) * samples // num_increments)
            steps = min(num_steps, -(-(raised_at - consumed) // size))
        consumed += steps * size
        num_steps -= steps
    return consumed


def derive(config: RunConfig, world_size: int) -> Derived:
    """The figures of a recipe on `world_size` processes.

    Raises:
        ValueError: the layout does not fit the world, or the batch does not divide; names the cure.
    """
    parallel, train = config.parallel, config.train
    replicas = data_parallel_size(
        world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    for knob, size in _batch_sizes(train).items():
        _check_batch_size(config, knob, size, replicas)
    parameters = num_parameters(config)
    tokens_per_step = train.global_batch_size * config.data.seq_length
    embeddings = 1 if config.model.share_embeddings_and_output_weights else 2
    return Derived(
        world_size=world_size,
        data_parallel_size=replicas,
        num_microbatches=train.global_batch_size // (train.micro_batch_size * replicas),
        tokens_per_step=tokens_per_step,
        total_tokens=consumed_after(train, train.num_steps) * config.data.seq_length,
        padded_vocab_size=padded_vocab_size(config),
        num_query_groups=num_query_groups(config),
        kv_channels=kv_channels(config),
        num_parameters=parameters,
        num_non_embedding_parameters=parameters
        - embeddings * padded_vocab_size(config) * config.model.hidden_size,
        flops_per_token=flops_per_token(config),
        weight_bytes=parameters * _BYTES[config.precision.dtype],
    )


def _batch_sizes(train: Train) -> dict[str, int]:
    """The numbers of which every batch is made, by the knob that gives them."""
    sizes = {"train.global_batch_size": train.global_batch_size}
    if train.rampup_batch_size is not None:
        start, increment, _ = train.rampup_batch_size
        sizes |= {"train.rampup_batch_size's start": start, "train.rampup_batch_size's increment": increment}
    return sizes


def _check_batch_size(config: RunConfig, knob: str, size: int, replicas: int) -> None:
    """Raises ValueError where micro-batches do not share it out."""
    micro_batch_size = config.train.micro_batch_size
    unit = micro_batch_size * replicas
    if size % unit:
        below = size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise ValueError(
            f"{knob}={size} must be a multiple of micro_batch_size * "
            f"data_parallel_size = {micro_batch_size} * {replicas} = {unit}; nearest: {nearest}"
        )
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.virtual_pipeline_model_parallel_size and size // unit % stages:
        raise ValueError(
            f"interleaved pipelining needs micro-batches per step ({size // unit}) in multiples of "
            f"pipeline_model_parallel_size={stages}; change {knob}={size} or train.micro_batch_size"
        )
