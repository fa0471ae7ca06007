"""Which modules Megatron-Core's transformer layer is made of."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from xdlm_megatron.model.attention import SDPAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron-Core's constructor.

    Upstream's WrappedTorchNorm refuses sequence parallelism; all that takes is the mark on the weight by
    which finalize_model_grads sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def core_attention(dtype: torch.dtype, masked: bool = False) -> type:
    """Transformer Engine's attention where it keeps no scores (16-bit on CUDA), torch's elsewhere.

    masked: attention is given a mask, with which Transformer Engine would keep them. No parameters in either.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if installed and torch.cuda.is_available() and dtype is not torch.float32 and not masked:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return SDPAttention


def build_block_spec(
    config: TransformerConfig, chunk: int | None, masked: bool = False
) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk: full attention, RMSNorm everywhere.

    Args:
        chunk: index of the virtual pipeline chunk, None without interleaving.
        masked: attention stays within documents.
    """
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention
    attention.params["attn_mask_type"] = AttnMaskType.no_mask
    attention.submodules.core_attention = core_attention(config.params_dtype, masked)
    if config.qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
