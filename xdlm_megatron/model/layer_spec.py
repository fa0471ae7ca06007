"""Which modules Megatron-Core's transformer layer is made of: Transformer Engine's, or twins in PyTorch.

Both have the same parameters, with the same names in checkpoints: Transformer Engine keeps a norm in the
matrix product behind it, and the twin's norms are stored under those names (`sharded_state_dict_keys_map`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from xdlm_megatron.model.attention import SDPAttention
from xdlm_megatron.parallel.gpu_packages import ADAM, FUSION, apex, transformer_engine


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron-Core's constructor.

    Upstream's WrappedTorchNorm refuses sequence parallelism; all that takes is the mark on the weight by
    which finalize_model_grads sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def core_attention(config: TransformerConfig, masked: bool = False) -> type:
    """Transformer Engine's attention in its layers where it keeps no scores, else torch's. No parameters.

    It keeps them in float32 and, masked, with a mask of any kind but causal or padding; its packed documents
    (THD) want each padded to twice the context-parallel size, cut in zig-zag, and a micro-batch in one row.
    """
    by_engine = config.transformer_impl == "transformer_engine"
    if by_engine and config.params_dtype is not torch.float32 and not masked:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return SDPAttention


def build_block_spec(
    config: TransformerConfig, chunk: int | None, masked: bool = False, causal: bool = False
) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk: RMSNorm everywhere, full attention or causal.

    Args:
        chunk: index of the virtual pipeline chunk, None without interleaving.
        masked: attention stays within documents.
    """
    by_engine = config.transformer_impl == "transformer_engine"
    layer, norm = _engine_layer(config) if by_engine else _local_layer(config)
    attention = layer.submodules.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.causal if causal else AttnMaskType.no_mask
    attention.submodules.core_attention = core_attention(config, masked)
    num_layers = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def who_computes(config: TransformerConfig, masked: bool, offloaded: float = 0.0) -> str:
    """One line: which of Transformer Engine, apex and PyTorch does what in this process, and why.

    Args:
        masked: attention stays within documents.
        offloaded: share of the optimizer that is the CPU's.
    """
    engine, apex_ = transformer_engine(), apex()
    by = {True: "Transformer Engine", False: "PyTorch"}
    by_engine = config.transformer_impl == "transformer_engine"
    adam = "Transformer Engine" if ADAM in engine.parts else "apex" if ADAM in apex_.parts else "PyTorch"
    if offloaded:
        rest = f", the rest by {adam}" if offloaded < 1 else ""
        adam = f"PyTorch on the CPU for {offloaded:.0%} of the weights{rest}"
    sums = "apex" if FUSION in apex_.parts else "PyTorch"
    if by_engine:
        sums = f"Transformer Engine, the head's {sums}"
    return (
        f"layers by {by[by_engine]}, attention by {by[core_attention(config, masked) is not SDPAttention]}, "
        f"Adam by {adam}, sums of weight gradients by {sums} ({engine}; {apex_})"
    )


def _engine_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """A layer by Transformer Engine, norms fused with the products behind them, and its norm."""
    from megatron.core.extensions.transformer_engine import TENorm

    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return spec, TENorm


def _local_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """A layer by PyTorch, and its norm."""
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec, RMSNorm
