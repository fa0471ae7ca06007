"""Recipe -> Megatron-Core's TransformerConfig, built last and never changed afterwards by us."""

from __future__ import annotations

import dataclasses
import difflib

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from xdlm_megatron.config.schema import Model, Parallel, Precision

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_transformer_config(model: Model, parallel: Parallel, precision: Precision) -> TransformerConfig:
    """The configuration of a bidirectional RMSNorm / SwiGLU / RoPE transformer.

    Raises:
        ValueError: `model.mcore` names a field unknown to TransformerConfig, or a value it refuses.
    """
    known = [f.name for f in dataclasses.fields(TransformerConfig)]
    for name in model.mcore:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"model.mcore.{name}: megatron-core's TransformerConfig has no such field{hint}")
    dtype = DTYPES[precision.dtype]
    fields = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels,
        qk_layernorm=model.qk_layernorm,
        layernorm_epsilon=model.layernorm_epsilon,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        # gloo matches messages by order alone, so an interleaved schedule must post them one by one.
        batch_p2p_comm=torch.cuda.is_available() and not parallel.virtual_pipeline_model_parallel_size,
        overlap_p2p_comm=bool(parallel.virtual_pipeline_model_parallel_size),
    )
    try:
        return TransformerConfig(**{**fields, **model.mcore})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"model: megatron-core refuses this transformer: {error}; change the field it names"
        ) from error
