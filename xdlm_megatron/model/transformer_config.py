"""Recipe -> Megatron-Core's TransformerConfig, built last and never changed afterwards by us."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from xdlm_megatron.config.gpu_rules import ENGINE_MCORE_FIELDS
from xdlm_megatron.config.schema import Model, Parallel, Precision
from xdlm_megatron.parallel.gpu_packages import FUSION, apex, transformer_engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_transformer_config(model: Model, parallel: Parallel, precision: Precision) -> TransformerConfig:
    """The configuration of a bidirectional RMSNorm / SwiGLU / RoPE transformer.

    Raises:
        ValueError: `model.mcore` names a field unknown to TransformerConfig, or a value it refuses; or the
            recipe needs a package that this process cannot use.
    """
    known = [f.name for f in dataclasses.fields(TransformerConfig)]
    for name in model.mcore:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"model.mcore.{name}: megatron-core's TransformerConfig has no such field{hint}")
    dtype = DTYPES[precision.dtype]
    impl = choose_transformer_impl(model, precision)
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
        bias_activation_fusion=impl == "transformer_engine",
        bias_dropout_fusion=impl == "transformer_engine",
        transformer_impl=impl,
        gradient_accumulation_fusion=can_fuse_gradient_accumulation(impl),
        **_fp8_fields(precision),
        calculate_per_token_loss=True,
        use_cpu_initialization=not torch.cuda.is_available(),
        # gloo matches messages by order alone, so an interleaved schedule must post them one by one.
        batch_p2p_comm=torch.cuda.is_available() and not parallel.virtual_pipeline_model_parallel_size,
        overlap_p2p_comm=bool(parallel.virtual_pipeline_model_parallel_size),
    )
    if model.mcore.get("gradient_accumulation_fusion") and not fields["gradient_accumulation_fusion"]:
        raise ValueError(
            "model.mcore.gradient_accumulation_fusion=true needs Transformer Engine or NVIDIA's apex "
            f"({transformer_engine()}; {apex()}); remove it: it is on where it can be"
        )
    if model.mcore.get("cuda_graph_impl", "none") != "none" and not torch.cuda.is_available():
        raise ValueError("model.mcore.cuda_graph_impl=local needs a GPU, and there is none; take none")
    try:
        return TransformerConfig(**{**fields, **model.mcore})
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"model: megatron-core refuses this transformer: {error}; change the field it names"
        ) from error


def choose_transformer_impl(model: Model, precision: Precision) -> Literal["transformer_engine", "local"]:
    """Who computes the layers, as Megatron-Core spells it.

    Auto takes Transformer Engine where this process can use it, but for float32, which is there to compare.

    Raises:
        ValueError: the recipe needs Transformer Engine and this process cannot use it.
    """
    engine = transformer_engine()
    if model.transformer_impl == "local":
        return "local"
    fields = [name for name in ENGINE_MCORE_FIELDS if model.mcore.get(name)]
    if model.transformer_impl == "transformer_engine":
        wanted_by, cure = "model.transformer_impl=transformer_engine", "take auto or local, or install it"
    elif precision.fp8 is not None:
        wanted_by, cure = f"precision.fp8={precision.fp8}", "set precision.fp8=null, or install it"
    elif fields:
        wanted_by, cure = f"model.mcore.{fields[0]}=true", "remove it, or install it"
    else:
        return "transformer_engine" if engine.parts and precision.dtype == "bfloat16" else "local"
    if not engine.parts:
        raise ValueError(f"{wanted_by} needs Transformer Engine on a GPU ({engine}); {cure} (docs/gpu.md)")
    return "transformer_engine"


def can_fuse_gradient_accumulation(impl: str) -> bool:
    """Whether a product can add its weight's gradient to Megatron's float32 sum.

    Transformer Engine's layers can by themselves, Megatron-Core's with a part of apex.
    """
    return impl == "transformer_engine" or FUSION in apex().parts


def _fp8_fields(precision: Precision) -> dict[str, Any]:
    if precision.fp8 is None:
        return {}
    at_start, at_end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return dict(
        fp8=precision.fp8,
        fp8_recipe=precision.fp8_recipe,
        fp8_param=precision.fp8_param_gather,
        first_last_layers_bf16=at_start + at_end > 0,
        num_layers_at_start_in_bf16=at_start,
        num_layers_at_end_in_bf16=at_end,
    )
