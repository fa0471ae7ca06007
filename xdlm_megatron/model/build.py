"""Recipe -> model chunks on their device, wrapped for mixed precision and data parallelism."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from xdlm_megatron.config.derive import keeps_documents_apart, padded_vocab_size
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.model.dlm import DiffusionLM
from xdlm_megatron.model.init import init_weights
from xdlm_megatron.model.layer_spec import build_block_spec
from xdlm_megatron.model.transformer_config import build_transformer_config
from xdlm_megatron.parallel.mesh import Mesh, seed_model_parallel_rng


class HalfPrecision(Float16Module):
    """Upstream's wrapper, whose logits stay in the model's precision.

    It would make a float32 copy of them, the largest tensor of a step; the loss computes in float32 anyway.
    """

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(*inputs, fp32_output=False)


def build_model(config: RunConfig, mesh: Mesh, draw_weights: bool = True) -> list[MegatronModule]:
    """This process's pipeline chunks, in the recipe's precision; not wrapped for training.

    draw_weights: initialise them; else memory holds what it held, for a caller that fills every parameter.
    """
    model = config.model
    if not draw_weights:
        model = dataclasses.replace(model, mcore={**model.mcore, "perform_initialization": False})
    transformer = build_transformer_config(model, config.parallel, config.precision)
    # Upstream's constructors draw from generators; init_weights replaces what they drew.
    seed_model_parallel_rng(config.run.seed, for_graphs=transformer.cuda_graph_impl == "local")
    chunks = [
        _build_chunk(config, transformer, mesh, index, draw_weights) for index in range(mesh.num_chunks)
    ]
    if transformer.bf16:
        return [HalfPrecision(transformer, chunk) for chunk in chunks]
    return list(chunks)


def wrap_for_training(
    chunks: list[MegatronModule],
    use_distributed_optimizer: bool,
    mesh: Mesh,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
) -> list[MegatronModule]:
    """Megatron's data-parallel wrapper: gradients accumulate in float32 and are reduced once a step.

    overlap_grad_reduce: while backward goes on. overlap_param_gather: an update leaves each process with the
    weights of its own shards; the next forward gathers them, or `whole_weights`.
    """
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=use_distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        fp8_param_gather=chunks[0].config.fp8_param,
    )
    return [
        DistributedDataParallel(
            chunk.config, ddp, chunk, disable_bucketing=index > 0, pg_collection=mesh.groups
        )
        for index, chunk in enumerate(chunks)
    ]


def forget_training(chunks: list[MegatronModule]) -> None:
    """Lets go of trained chunks, which would outlive their run with the groups and the groups' threads.

    Their gradient hooks hold them, and autograd's nodes hold the hooks, where no garbage collector looks. The
    nodes are held by Megatron's list of them, and in float32 by the optimizer's views of the weights.
    """
    for chunk in chunks:
        chunk.grad_accs.clear()
        chunk.config.grad_scale_func = chunk.config.no_sync_func = None  # methods of optimizer and chunk
        for weight in chunk.parameters():
            weight.main_param = None


@contextmanager
def whole_weights(chunks: list[MegatronModule]) -> Iterator[None]:
    """Inside, every process has every weight as the last update left it, for others than a step to use."""
    gathering = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in gathering:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in gathering:
            chunk.enable_forward_pre_hook()


def unwrap(chunk: MegatronModule) -> DiffusionLM:
    """The DiffusionLM inside its wrappers."""
    while isinstance(chunk, DistributedDataParallel | Float16Module):
        chunk = chunk.module
    return chunk


def _build_chunk(
    config: RunConfig, transformer: TransformerConfig, mesh: Mesh, index: int, draw_weights: bool
) -> DiffusionLM:
    chunk_index = index if mesh.virtual_pipeline_size else None
    chunk = DiffusionLM(
        transformer,
        build_block_spec(
            transformer,
            chunk_index,
            masked=keeps_documents_apart(config.data),
            causal=config.model.autoregressive,
        ),
        padded_vocab_size=padded_vocab_size(config),
        seq_length=config.data.seq_length,
        groups=mesh.groups,
        is_first_stage=mesh.is_first_stage(index),
        is_last_stage=mesh.is_last_stage(index),
        chunk=chunk_index,
        share_embeddings_and_output_weights=config.model.share_embeddings_and_output_weights,
        rotary_base=config.model.rotary_base,
        start_id=config.data.mask_id if config.model.autoregressive else None,
    )
    if draw_weights:
        tied = config.model.share_embeddings_and_output_weights
        init_weights(
            chunk,
            seed=config.run.seed,
            vocab_size=config.data.vocab_size,
            zero_head=config.model.zero_init_head and not tied,
        )
    for parameter in chunk.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return chunk.to(mesh.device) if mesh.device != torch.device("cpu") else chunk
