"""Which knobs of FP8, Transformer Engine and overlap contradict each other; rules.py asks for all of them."""

from __future__ import annotations

from collections.abc import Iterator

from xdlm_megatron.config.derive import keeps_documents_apart, kv_channels, num_query_groups
from xdlm_megatron.config.schema import RunConfig

# Rows and columns of an FP8 matrix product come in multiples of these (megatron.core.fp8_utils).
FP8_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}

# Fields of TransformerConfig that only an FP8 recipe reads, and those that only `delayed` does.
DELAYED_MCORE_FIELDS = (
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_wgrad",
    "tp_only_amax_red",
)
FP8_MCORE_FIELDS = (*DELAYED_MCORE_FIELDS, "fp8_dot_product_attention", "fp8_multi_head_attention")

# Fields of TransformerConfig that only Transformer Engine's layers read.
ENGINE_MCORE_FIELDS = ("tp_comm_overlap", "cpu_offloading")

# Fields of TransformerConfig for training alone.
TRAINING_MCORE_FIELDS = (*ENGINE_MCORE_FIELDS, "cpu_offloading_num_layers", "cuda_graph_impl")


def find_gpu_contradictions(config: RunConfig) -> Iterator[str]:
    yield from _fp8_knobs(config)
    if config.precision.fp8 is not None:
        yield from _fp8_shapes(config)
    yield from _engine_knobs(config)
    yield from _overlap_knobs(config)
    yield from _optimizer_offload_knobs(config)
    if config.model.mcore.get("cuda_graph_impl", "none") != "none":
        yield from _graph_knobs(config)


def _fp8_knobs(config: RunConfig) -> Iterator[str]:
    precision, mcore = config.precision, config.model.mcore
    recipe = f"precision.fp8_recipe={precision.fp8_recipe}"
    kept = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    if precision.fp8 is None:
        off = {"fp8_recipe": "tensorwise", "fp8_param_gather": False}
        off |= dict.fromkeys(("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"), 0)
        for name, value in off.items():
            if getattr(precision, name) != value:
                yield (
                    f"precision.{name}={getattr(precision, name)} has no effect without precision.fp8; "
                    "set that, or remove this"
                )
        for name in FP8_MCORE_FIELDS:
            if name in mcore:
                yield f"model.mcore.{name} has no effect without precision.fp8; set that, or remove this"
        return
    if precision.dtype != "bfloat16":
        yield (
            f"precision.fp8={precision.fp8} needs precision.dtype=bfloat16 (got {precision.dtype}), in which "
            "all but the layers' products stay; set it"
        )
    if precision.fp8_recipe != "delayed":
        for name in DELAYED_MCORE_FIELDS:
            if name in mcore:
                yield f"model.mcore.{name} has no effect at {recipe}; take delayed, or remove it"
    elif any(kept):
        yield (
            f"{recipe} cannot leave layers in bfloat16 (precision.num_layers_at_start_in_bf16={kept[0]}, "
            f"num_layers_at_end_in_bf16={kept[1]}): its scales are reduced once for all; take tensorwise"
        )
    stages = config.parallel.pipeline_model_parallel_size
    per_stage = config.model.num_layers // stages
    if max(kept) > per_stage or sum(kept) >= config.model.num_layers:
        yield (
            f"precision.num_layers_at_start_in_bf16={kept[0]} and num_layers_at_end_in_bf16={kept[1]} must "
            f"each be at most the {per_stage} layers of a pipeline stage and leave some of "
            f"model.num_layers={config.model.num_layers} to FP8; lower them"
        )
    if precision.fp8_param_gather and not config.optimizer.use_distributed_optimizer:
        yield (
            "precision.fp8_param_gather=true needs optimizer.use_distributed_optimizer=true, whose float32 "
            "weights it is made from; set that"
        )
    if precision.fp8_param_gather and precision.fp8_recipe == "mxfp8":
        yield (
            f"precision.fp8_param_gather=true does not go with {recipe}, whose blocks do not gather; "
            "turn it off, or take another recipe"
        )


def _fp8_shapes(config: RunConfig) -> Iterator[str]:
    """All that Transformer Engine would refuse in the middle of a step."""
    multiple = FP8_MULTIPLE[config.precision.fp8_recipe]
    why = f"of {multiple} for precision.fp8_recipe={config.precision.fp8_recipe}"
    model, head, groups = config.model, kv_channels(config), num_query_groups(config)
    tp, cp = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    over_tp = f" over parallel.tensor_model_parallel_size={tp}" if tp > 1 else ""
    over_cp = f" over parallel.context_parallel_size={cp}" if cp > 1 else ""
    slices = cp
    if config.parallel.sequence_parallel:  # a rank's own slice is checked and rounded before it is gathered
        slices, over_cp = cp * tp, f"{over_cp}{over_tp} with parallel.sequence_parallel=true"
    query, qkv = model.num_attention_heads * head, (model.num_attention_heads + 2 * groups) * head
    of_heads = f"model.num_attention_heads={model.num_attention_heads} of width {head}, in all"
    for name, size, unit in (
        (f"model.hidden_size={model.hidden_size}", model.hidden_size, multiple),
        (f"model.ffn_hidden_size={model.ffn_hidden_size}{over_tp}", model.ffn_hidden_size, multiple * tp),
        (f"{of_heads} {query}{over_tp},", query, multiple * tp),
        (f"{of_heads} {qkv} with keys and values{over_tp},", qkv, multiple * tp),
        (f"data.seq_length={config.data.seq_length}{over_cp}", config.data.seq_length, multiple * slices),
    ):
        if size % unit:
            yield f"{name} must be a multiple {why}; nearest: {_nearest(size, unit)}"


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def _engine_knobs(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    wanted = [f"precision.fp8={config.precision.fp8}"] if config.precision.fp8 is not None else []
    wanted += [f"model.mcore.{name}=true" for name in ENGINE_MCORE_FIELDS if model.mcore.get(name)]
    for knob in wanted if model.transformer_impl == "local" else ():
        yield (
            f"{knob} needs Transformer Engine's layers and model.transformer_impl=local has PyTorch's; "
            "take transformer_engine, or auto"
        )
    if model.mcore.get("tp_comm_overlap") and not parallel.sequence_parallel:
        yield (
            "model.mcore.tp_comm_overlap=true overlaps the messages of "
            "parallel.sequence_parallel=true, which is false; set that, or remove it"
        )
    if bool(model.mcore.get("cpu_offloading")) != bool(model.mcore.get("cpu_offloading_num_layers")):
        yield (
            "model.mcore.cpu_offloading=true and cpu_offloading_num_layers of 1 or more have no effect "
            "without each other; set both, or remove both"
        )
    if model.mcore.get("cpu_offloading"):
        for name, on in (
            ("model.mcore.recompute_granularity", model.mcore.get("recompute_granularity") is not None),
            ("parallel.pipeline_model_parallel_size above 1", parallel.pipeline_model_parallel_size > 1),
        ):
            if on:
                yield f"model.mcore.cpu_offloading=true does not go with {name}; remove one of them"
    slices = parallel.context_parallel_size
    by_engine = model.transformer_impl != "local" and config.precision.dtype == "bfloat16"
    if (
        by_engine
        and not keeps_documents_apart(config.data)
        and slices > 1
        and config.data.seq_length % (2 * slices)
    ):
        yield (
            f"data.seq_length={config.data.seq_length} over parallel.context_parallel_size={slices} must be "
            f"even for Transformer Engine's attention, which model.transformer_impl={model.transformer_impl} "
            "takes where it is; change one of the sizes, or take local"
        )


def _overlap_knobs(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.overlap_grad_reduce and config.train.fuse_head == "always":
        yield (
            "train.fuse_head=always makes the head's gradient in forward, and "
            "parallel.overlap_grad_reduce=true waits for it in backward; take auto or never, or turn that off"
        )
    if parallel.overlap_param_gather and not (
        parallel.overlap_grad_reduce and config.optimizer.use_distributed_optimizer
    ):
        yield (
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true and "
            "optimizer.use_distributed_optimizer=true; set both, or turn it off"
        )


def _optimizer_offload_knobs(config: RunConfig) -> Iterator[str]:
    """The CPU's float32 weights are made of the model's, which must be bfloat16 and sharded."""
    optimizer, precision = config.optimizer, config.precision
    if not optimizer.optimizer_cpu_offload:
        if optimizer.optimizer_offload_fraction != 1:
            yield (
                f"optimizer.optimizer_offload_fraction={optimizer.optimizer_offload_fraction} has no effect "
                "without optimizer.optimizer_cpu_offload=true; set that, or remove this"
            )
        return
    for knob, value, wanted in (
        ("precision.dtype", precision.dtype, "bfloat16"),
        ("precision.fp8_param_gather", precision.fp8_param_gather, False),
        ("optimizer.use_distributed_optimizer", optimizer.use_distributed_optimizer, True),
    ):
        if value != wanted:
            yield (
                f"optimizer.optimizer_cpu_offload=true needs {knob}={str(wanted).lower()} "
                f"(got {str(value).lower()}): its float32 weights are made of shards in bfloat16; set that, "
                "or turn it off"
            )


def _graph_knobs(config: RunConfig) -> Iterator[str]:
    """A captured layer is replayed as it was: the same shapes, arguments and order."""
    impl = f"model.mcore.cuda_graph_impl={config.model.mcore['cuda_graph_impl']}"
    if config.model.mcore["cuda_graph_impl"] != "local":
        yield f"{impl} is not offered; take local, which captures each layer, or none"
    if config.parallel.pipeline_model_parallel_size > 1:
        yield (
            f"{impl} captures a layer once for each micro-batch of a pipeline and evaluation has others: "
            "parallel.pipeline_model_parallel_size must be 1; set it, or take none"
        )
    if config.model.hidden_dropout or config.model.attention_dropout:
        yield (
            f"{impl} cannot seed dropout anew each step; set model.hidden_dropout and "
            "model.attention_dropout to 0, or take none"
        )
    if config.data.random_length_fraction and config.data.packing == "stream":
        yield (
            f"{impl} needs a mask in every micro-batch or in none, and data.random_length_fraction="
            f"{config.data.random_length_fraction} at data.packing=stream has both; set it to 0, or take none"
        )
    for name in ("cpu_offloading", "recompute_granularity"):
        if config.model.mcore.get(name):
            yield f"{impl} does not go with model.mcore.{name}; remove one of them"
