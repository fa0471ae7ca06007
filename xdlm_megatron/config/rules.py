"""Which knobs of a recipe contradict each other: one line each, with the value, the rule and the cure."""

from __future__ import annotations

from collections.abc import Iterator

from xdlm_megatron.config.derive import kv_channels, num_query_groups
from xdlm_megatron.config.gpu_rules import find_gpu_contradictions
from xdlm_megatron.config.samplers import RemdmLoopSampler
from xdlm_megatron.config.schema import RunConfig, WsdLr

# Fields of TransformerConfig that a recipe must not set by the back door: another knob owns them, ...
OWNED_MCORE_FIELDS = {
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "ffn_hidden_size": "model.ffn_hidden_size",
    "num_attention_heads": "model.num_attention_heads",
    "num_query_groups": "model.num_query_groups",
    "kv_channels": "model.kv_channels",
    "qk_layernorm": "model.qk_layernorm",
    "layernorm_epsilon": "model.layernorm_epsilon",
    "hidden_dropout": "model.hidden_dropout",
    "attention_dropout": "model.attention_dropout",
    "init_method_std": "model.init_method_std",
    "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
    "context_parallel_size": "parallel.context_parallel_size",
    "sequence_parallel": "parallel.sequence_parallel",
    "params_dtype": "precision.dtype",
    "pipeline_dtype": "precision.dtype",
    "bf16": "precision.dtype",
    "fp16": "precision.dtype",
    "fp8": "precision.fp8",
    "fp8_recipe": "precision.fp8_recipe",
    "fp8_param": "precision.fp8_param_gather",
    "first_last_layers_bf16": "precision.num_layers_at_start_in_bf16",
    "num_layers_at_start_in_bf16": "precision.num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16": "precision.num_layers_at_end_in_bf16",
    "transformer_impl": "model.transformer_impl",
}

# ... or the loss, the parameter count and the checkpoints assume their value.
FIXED_MCORE_FIELDS = {
    "calculate_per_token_loss": "losses are sums and counts here",
    "gated_linear_unit": "the model is SwiGLU",
    "activation_func": "the model is SwiGLU",
    "normalization": "the model uses RMSNorm",
    "add_bias_linear": "the model has no biases",
    "num_moe_experts": "experts are not supported yet",
    "fp4": "precision.fp8 goes down to 8 bits",
    **dict.fromkeys(
        ("attention_softmax_in_fp32", "apply_query_key_layer_scaling", "masked_softmax_fusion"),
        "the attention kernel does not read it",
    ),
    "expert_model_parallel_size": "experts are not supported yet",
    "cuda_graph_scope": "whole layers are captured",
    **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph"), "cuda_graph_impl took its place"),
}


def find_contradictions(config: RunConfig) -> list[str]:
    """Every contradiction of a recipe whose fields are valid one by one."""
    return [
        *_model_contradictions(config),
        *_parallel_contradictions(config),
        *_run_contradictions(config),
        *find_gpu_contradictions(config),
    ]


def _model_contradictions(config: RunConfig) -> Iterator[str]:
    model = config.model
    width = f"model.hidden_size={model.hidden_size}"
    heads = f"model.num_attention_heads={model.num_attention_heads}"
    if model.kv_channels is not None:
        if model.kv_channels % 2:
            yield f"model.kv_channels={model.kv_channels} must be even for rotary embeddings; make it even"
    elif model.hidden_size % model.num_attention_heads:
        yield f"{width} must be a multiple of {heads}; change one, or set model.kv_channels"
    elif kv_channels(config) % 2:
        yield (
            f"{width} over {heads} gives heads of width {kv_channels(config)}, which must be even for rotary "
            "embeddings; change one, or set model.kv_channels"
        )
    if model.num_attention_heads % num_query_groups(config):
        yield f"{heads} must be a multiple of model.num_query_groups={model.num_query_groups}; change one"
    for name in model.mcore:
        if name in OWNED_MCORE_FIELDS:
            yield f"model.mcore.{name}: cannot be set here; set {OWNED_MCORE_FIELDS[name]}"
        if name in FIXED_MCORE_FIELDS:
            yield f"model.mcore.{name}: cannot be set, {FIXED_MCORE_FIELDS[name]}; remove it"
    yield from _twin_contradictions(config)
    if 0 < config.diffusion.uniform_ratio < 1e-12:
        yield (
            f"diffusion.uniform_ratio={config.diffusion.uniform_ratio} must be 0 or at least 1e-12, which "
            "float32 still resolves; take 0"
        )
    packing = f"data.packing={config.data.packing}"
    if config.diffusion.time_per == "document" and config.data.packing != "documents":
        yield f"diffusion.time_per=document has no effect at {packing}; take documents, or time_per=sequence"
    if config.data.packing == "documents" and model.mcore.get("apply_rope_fusion"):
        yield (
            f"model.mcore.apply_rope_fusion=true cannot restart positions, which {packing} does; turn one off"
        )
    if config.data.mask_id >= config.data.vocab_size:
        yield (
            f"data.mask_id={config.data.mask_id} must be below data.vocab_size={config.data.vocab_size}, "
            "which counts the mask; correct one of them"
        )


def _twin_contradictions(config: RunConfig) -> Iterator[str]:
    """An autoregressive model has no noise, and reads every token before the one that it predicts."""
    if not config.model.autoregressive:
        return
    knob, diffusion, parallel = "model.autoregressive=true", config.diffusion, config.parallel
    if diffusion.uniform_ratio:
        yield f"{knob} has no noise, and diffusion.uniform_ratio={diffusion.uniform_ratio}; set it to 0"
    if config.sampling.kind != "left_to_right":
        yield f"{knob} cannot sample by sampling.kind={config.sampling.kind}; take left_to_right"
    if config.sampling.guidance_scale:
        yield (
            f"{knob} never saw a hidden prompt, and sampling.guidance_scale={config.sampling.guidance_scale} "
            "compares with one; set it to 0"
        )
    if config.sampling.block_size is not None:
        yield (
            f"{knob} goes token by token, where sampling.block_size={config.sampling.block_size} has no "
            "effect; leave it out"
        )
    if parallel.context_parallel_size > 1:
        yield (
            f"{knob} reads a whole sequence, and parallel.context_parallel_size="
            f"{parallel.context_parallel_size} cuts it; set it to 1"
        )


def _parallel_contradictions(config: RunConfig) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    tp_knob = f"parallel.tensor_model_parallel_size={tp}"
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(model, name)
        if value is not None and value % tp:
            yield f"model.{name}={value} must be a multiple of {tp_knob}; change one of them"
    vpp = parallel.virtual_pipeline_model_parallel_size
    if vpp and pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={vpp} has no effect at "
            "parallel.pipeline_model_parallel_size=1; remove it or add stages"
        )
    chunks = pp * (vpp or 1)
    if model.num_layers % chunks:
        yield (
            f"model.num_layers={model.num_layers} must be a multiple of the {chunks} pipeline chunks "
            f"(parallel.pipeline_model_parallel_size={pp} times virtual {vpp or 1}); change one of them"
        )
    if parallel.sequence_parallel and tp == 1:
        yield f"parallel.sequence_parallel=true has no effect at {tp_knob}; turn it off or split tensors"
    cp = parallel.context_parallel_size
    slices = cp * (tp if parallel.sequence_parallel else 1)
    if config.data.seq_length % slices:
        yield (
            f"data.seq_length={config.data.seq_length} must be a multiple of its {slices} slices "
            f"(parallel.context_parallel_size={cp}, and {tp_knob} with parallel.sequence_parallel=true); "
            "change one of them"
        )


def _run_contradictions(config: RunConfig) -> Iterator[str]:
    schedule, train = config.lr_schedule, config.train
    steps = f"train.num_steps={train.num_steps}"
    if schedule.warmup_steps >= train.num_steps:
        yield f"lr_schedule.warmup_steps={schedule.warmup_steps} must be below {steps}; shorten the warm-up"
    elif isinstance(schedule, WsdLr) and schedule.warmup_steps + schedule.decay_steps > train.num_steps:
        yield (
            f"lr_schedule.warmup_steps={schedule.warmup_steps} and lr_schedule.decay_steps="
            f"{schedule.decay_steps} together exceed {steps}; shorten one of them"
        )
    min_lr = getattr(schedule, "min_lr", 0.0)
    if min_lr > config.optimizer.lr:
        yield f"lr_schedule.min_lr={min_lr} exceeds optimizer.lr={config.optimizer.lr}; lower it"
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size={train.global_batch_size} must be a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}; change one of them"
        )
    if train.rampup_batch_size is not None:
        start, increment, _ = train.rampup_batch_size
        if start >= train.global_batch_size or (train.global_batch_size - start) % increment:
            yield (
                f"train.rampup_batch_size={list(train.rampup_batch_size)} must lead from its start in whole "
                f"increments up to train.global_batch_size={train.global_batch_size}; change one of them"
            )
    if train.stop_after_step and train.stop_after_step >= train.num_steps:
        yield f"train.stop_after_step={train.stop_after_step} has no effect at {steps}; remove it"
    sampling = config.sampling
    if isinstance(sampling, RemdmLoopSampler) and sampling.t_off >= sampling.t_on:
        yield (f"sampling.t_off={sampling.t_off} must be below sampling.t_on={sampling.t_on}; change one")
    checkpoint = config.checkpoint
    if checkpoint.keep_every and checkpoint.keep_every % checkpoint.save_interval:
        yield (
            f"checkpoint.keep_every={checkpoint.keep_every} must be a multiple of "
            f"checkpoint.save_interval={checkpoint.save_interval}; change one of them"
        )
    uri = config.tracking.mlflow
    if uri is not None and uri != "local" and not uri.startswith(("http://", "https://")):
        yield f"tracking.mlflow={uri!r} must be 'local', an http(s) URI or null; correct it"
