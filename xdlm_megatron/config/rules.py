"""Which knobs of a recipe contradict each other: one line each, with the value, the rule and the cure."""

from __future__ import annotations

from collections.abc import Iterator

from xdlm_megatron.config.derive import kv_channels, num_query_groups
from xdlm_megatron.config.schema import RunConfig

# Fields of TransformerConfig that a recipe must not set by the back door: other knobs own them, or the model
# would no longer be the bidirectional denoiser that the loss assumes.
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
    "sequence_parallel": "parallel.sequence_parallel",
    "params_dtype": "precision.dtype",
    "pipeline_dtype": "precision.dtype",
    "bf16": "precision.dtype",
    "fp16": "precision.dtype",
    "calculate_per_token_loss": "none: losses are sums and counts here",
    "gated_linear_unit": "none: the model is SwiGLU",
    "activation_func": "none: the model is SwiGLU",
    "normalization": "none: the model uses RMSNorm",
    "add_bias_linear": "none: the model has no biases",
    "context_parallel_size": "none: context parallelism is not supported yet",
    "num_moe_experts": "none: experts are not supported yet",
}


def find_contradictions(config: RunConfig) -> list[str]:
    """Every contradiction of a recipe whose fields are valid one by one."""
    return [*_model_contradictions(config), *_parallel_contradictions(config), *_run_contradictions(config)]


def _model_contradictions(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size={model.hidden_size} must be a multiple of model.num_attention_heads="
            f"{model.num_attention_heads}; change one, or set model.kv_channels"
        )
    if kv_channels(config) % 2:
        yield f"model.kv_channels={kv_channels(config)} must be even for rotary embeddings; make it even"
    if model.num_attention_heads % num_query_groups(config):
        yield (
            f"model.num_attention_heads={model.num_attention_heads} must be a multiple of "
            f"model.num_query_groups={model.num_query_groups}; change one of them"
        )
    for name in sorted(model.mcore.keys() & OWNED_MCORE_FIELDS.keys()):
        yield f"model.mcore.{name}: this field is set elsewhere; the knob is {OWNED_MCORE_FIELDS[name]}"
    if config.data.mask_id >= config.data.vocab_size:
        yield (
            f"data.mask_id={config.data.mask_id} must be below data.vocab_size={config.data.vocab_size}, "
            "which counts the mask; correct one of them"
        )


def _parallel_contradictions(config: RunConfig) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for name, value in (
        ("model.num_query_groups", num_query_groups(config)),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % tp:
            yield f"{name}={value} must be a multiple of parallel.tensor_model_parallel_size={tp}; change one of them"
    vpp = parallel.virtual_pipeline_model_parallel_size
    if vpp and pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={vpp} needs parallel.pipeline_model_parallel_size > 1; "
            "remove it or add stages"
        )
    chunks = pp * (vpp or 1)
    if model.num_layers % chunks:
        yield (
            f"model.num_layers={model.num_layers} must be a multiple of the {chunks} pipeline chunks "
            f"(parallel.pipeline_model_parallel_size={pp} times virtual {vpp or 1}); change one of them"
        )
    if parallel.sequence_parallel and tp == 1:
        yield (
            "parallel.sequence_parallel=true has no effect at parallel.tensor_model_parallel_size=1; "
            "turn it off or use tensor parallelism"
        )
    if parallel.sequence_parallel and config.data.seq_length % tp:
        yield (
            f"data.seq_length={config.data.seq_length} must be a multiple of parallel.tensor_model_parallel_size={tp} "
            "with parallel.sequence_parallel; change one of them"
        )


def _run_contradictions(config: RunConfig) -> Iterator[str]:
    schedule, train = config.lr_schedule, config.train
    if schedule.warmup_steps >= train.num_steps and schedule.warmup_steps:
        yield (
            f"lr_schedule.warmup_steps={schedule.warmup_steps} must be below train.num_steps={train.num_steps}; "
            "shorten the warm-up"
        )
    decay = getattr(schedule, "decay_steps", 0)
    if schedule.warmup_steps + decay > train.num_steps:
        yield (
            f"lr_schedule.warmup_steps + decay_steps = {schedule.warmup_steps + decay} exceeds "
            f"train.num_steps={train.num_steps}; shorten one of them"
        )
    min_lr = getattr(schedule, "min_lr", 0.0)
    if min_lr > config.optimizer.lr:
        yield f"lr_schedule.min_lr={min_lr} exceeds optimizer.lr={config.optimizer.lr}; lower it"
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size={train.global_batch_size} must be a multiple of "
            f"train.micro_batch_size={train.micro_batch_size}; change one of them"
        )
    if train.stop_after_step and train.stop_after_step >= train.num_steps:
        yield (
            f"train.stop_after_step={train.stop_after_step} has no effect at train.num_steps={train.num_steps}; "
            "remove it"
        )
    uri = config.tracking.mlflow
    if uri is not None and uri != "local" and not uri.startswith(("http://", "https://")):
        yield f"tracking.mlflow={uri!r} must be 'local', an http(s) URI or null; correct it"
