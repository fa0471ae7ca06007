"""Time of one optimizer step, by part: an estimate from data sheets and the assumptions below.

A micro-batch passes a layer at the rate of its matrix products, of its attention, of its memory traffic and
of the messages of its tensor- and context-parallel groups, one after the other: nothing is taken to overlap,
as nothing does unless the recipe asks for it. Small work is bounded below by the launches of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdlm_megatron.launch.gpus import Gpu
from xdlm_megatron.launch.layout import Layout, Shape
from xdlm_megatron.launch.memory import layer_activations, layer_matrices, optimizer_shards, rank_parameters

# Assumed, not measured here. Each is a share of the data sheet's rate unless it has a unit.
PRODUCT_EFFICIENCY = 0.75  # of a large matrix product
HALF_SPEED_SIZE = 256  # the smallest side of a product that reaches half of that
ATTENTION_EFFICIENCY = 0.5  # of fused attention, forward and backward together
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.75  # of collectives, in a node and between nodes
HOST_MEMORY, HOST_LINK = 40e9, 25e9  # bytes/s that the CPU has for one GPU: its memory, and PCIe 4.0 x16
LATENCY = 15e-6  # seconds of a collective or a message
LAUNCH = 4e-6  # seconds a kernel
KERNELS_FORWARD, KERNELS_BACKWARD = 45, 80  # of a layer
TRAFFIC_AGAIN = 1.25  # that times more where some are computed again
TRAFFIC = 4  # times a layer's activations pass the memory: written, read, their gradients written and read

ASSUMPTIONS = (
    f"matrix products at {PRODUCT_EFFICIENCY:.0%} of the peak rate times n / (n + {HALF_SPEED_SIZE}), n the "
    f"smallest side; attention at {ATTENTION_EFFICIENCY:.0%}; HBM at {MEMORY_EFFICIENCY:.0%}, links and "
    f"network at {LINK_EFFICIENCY:.0%} of their data sheets",
    "no communication is hidden behind work but the messages of an interleaved pipeline "
    "(parallel.overlap_grad_reduce and its like may hide some); a collective takes "
    f"{LATENCY * 1e6:.0f} us to start, a kernel {LAUNCH * 1e6:.0f} us",
    "ranks lie as Megatron orders them (tensor, context, data, pipeline): a group that leaves its node goes "
    "at the network's rate",
    f"an offloaded optimizer has {HOST_MEMORY / 1e9:.0f} GB/s of the CPU's memory and "
    f"{HOST_LINK / 1e9:.0f} GB/s to it for each GPU, one after the other",
    "FLOPs count full (bidirectional) attention and the head; MFU counts none that are computed twice, and "
    "takes the peak rate of precision.dtype, also where layers are in FP8",
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step, by group, on the busiest stage."""

    tensor: float
    context: float
    pipeline: float
    data: float


@dataclass(frozen=True)
class Seconds:
    """A step of the slowest stage, by part; bubble: it waits for the other stages."""

    layers: float
    head: float
    tensor: float
    context: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Step:
    """What a layout's step costs. bubble_share: idle time of the pipeline over its busy time."""

    seconds: Seconds
    traffic: Traffic
    bubble_share: float
    mfu: float
    tokens_per_second: float
    days: float


def step_cost(shape: Shape, layout: Layout, gpu: Gpu) -> Step:
    """Of the stage with the head: it has as many layers as any other."""
    m, layers = layout.microbatches(shape), layout.layers(shape)
    residual = layout.tokens(shape) * shape.hidden * shape.bytes
    tensor_calls, rounds = tensor_messages(shape, layout)
    tensor = rounds * residual * (layout.tp - 1) / layout.tp
    context = context_bytes(shape, layout)
    pipeline = 2 * layout.vpp * residual / layout.sequence_slices if layout.pp > 1 else 0.0
    data, data_seconds = _data_parallel(shape, layout, gpu)

    layer = _layer_seconds(shape, layout, gpu)
    head = _head_seconds(shape, layout, gpu)
    on_tensor = _send(tensor, tensor_calls, 1, layout.tp, gpu)
    on_context = _send(context, 6 * layers, layout.tp, layout.cp, gpu)
    stride = layout.tp * layout.cp * layout.dp
    on_pipeline = _send(pipeline, 2 * layout.vpp, stride, layout.pp, gpu) if layout.vpp == 1 else 0.0
    of_microbatch = layers * layer + head + on_tensor + on_context + on_pipeline
    bubble_share = (layout.pp - 1) / (layout.vpp * m)
    seconds = Seconds(
        layers=m * layers * layer,
        head=m * head,
        tensor=m * on_tensor,
        context=m * on_context,
        pipeline=m * on_pipeline,
        bubble=bubble_share * m * of_microbatch,
        data=data_seconds,
        optimizer=_optimizer_seconds(shape, layout, gpu),
    )
    tokens_per_second = shape.tokens_per_step / seconds.total
    achieved = tokens_per_second * shape.flops_per_token / layout.world
    return Step(
        seconds=seconds,
        traffic=Traffic(m * tensor, m * context, m * pipeline, data),
        bubble_share=bubble_share,
        mfu=achieved / gpu.flops(shape.dtype),
        tokens_per_second=tokens_per_second,
        days=shape.total_tokens / tokens_per_second / 86400,
    )


def _layer_seconds(shape: Shape, layout: Layout, gpu: Gpu) -> float:
    """Forward and backward of one layer and micro-batch, and what is computed again."""
    t, tp = layout.tokens(shape), layout.tp
    attention_matrices = shape.hidden * (2 * shape.query + 2 * shape.key) / tp
    mlp_matrices = 3 * shape.hidden * shape.ffn / tp
    again = {"none": 0.0, "mlp": mlp_matrices, "full": attention_matrices + mlp_matrices}[layout.recompute]
    product_flops = 2 * t * (3 * (attention_matrices + mlp_matrices) + again)
    side = min(t, shape.hidden, shape.query // tp, shape.ffn // tp)
    rate = gpu.flops(shape.dtype)
    fp8 = shape.fp8_share
    products = product_flops * ((1 - fp8) / rate + fp8 / (gpu.fp8_flops or rate))
    passes = 3 + (layout.recompute == "full")
    attention_flops = passes * 4 * t * shape.seq_length * shape.query / tp
    traffic = TRAFFIC * layer_activations(shape, layout, "none")
    if layout.recompute != "none":
        traffic *= TRAFFIC_AGAIN
    kernels = KERNELS_FORWARD + KERNELS_BACKWARD
    if layout.recompute != "none":
        kernels += KERNELS_FORWARD if layout.recompute == "full" else KERNELS_FORWARD // 4
    busy = (
        products / _product_efficiency(side)
        + attention_flops / (rate * ATTENTION_EFFICIENCY)
        + traffic / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    )
    return max(busy, kernels * LAUNCH)


def _head_seconds(shape: Shape, layout: Layout, gpu: Gpu) -> float:
    """Three products with the head's matrix, and a loss that reads the logits three times and writes once."""
    t, shard = layout.tokens(shape), layout.padded_vocab(shape) // layout.tp
    products = 6 * t * shard * shape.hidden
    side = min(t, shape.hidden, shard)
    traffic = 4 * t * shard * shape.bytes
    return products / (gpu.flops(shape.dtype) * _product_efficiency(side)) + traffic / (
        gpu.memory_bandwidth * MEMORY_EFFICIENCY
    )


def _product_efficiency(side: int) -> float:
    return PRODUCT_EFFICIENCY * side / (side + HALF_SPEED_SIZE)


def tensor_messages(shape: Shape, layout: Layout) -> tuple[int, int]:
    """Collectives over the tensor-parallel group for one micro-batch, and in how many rounds they send.

    A round sends (tp - 1) / tp of the micro-batch's hidden states; an all-reduce takes two. Each of a layer's
    two blocks has, with sequence parallelism, an all-gather and a reduce-scatter forward, both again
    backward, and one more all-gather for the weight's gradient; without it an all-reduce forward and one
    backward. What is recomputed is sent again. Embedding and head have half a block each.
    """
    if layout.tp == 1:
        return 0, 0
    again = {"none": 0, "mlp": 1, "full": 2}[layout.recompute]
    ends = 2 if layout.pp == 1 else 1  # embedding and head, or the head alone
    if layout.sequence_parallel:
        calls = layout.layers(shape) * (10 + 2 * again) + 2 * ends + 1
        return calls, calls
    calls = layout.layers(shape) * (4 + again) + ends
    return calls, 2 * calls


def context_bytes(shape: Shape, layout: Layout) -> float:
    """Sent for one micro-batch: keys and values are gathered forward, their gradients scattered backward."""
    gathers = 3 if layout.recompute == "full" else 2
    whole = layout.tokens(shape) * layout.cp * 2 * shape.key / layout.tp * shape.bytes
    return layout.layers(shape) * gathers * whole * (layout.cp - 1) / layout.cp


def _data_parallel(shape: Shape, layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """Bytes sent and seconds: gradients are reduced in float32, weights gathered in their own type."""
    ranks = layout.dp * layout.cp
    parameters = max(rank_parameters(shape, layout, stage) for stage in (0, layout.pp - 1))
    once = parameters * (ranks - 1) / ranks
    sent = once * (4 + shape.bytes) if shape.distributed_optimizer else once * 2 * 4
    if shape.fp8_param_gather:
        in_fp8 = shape.fp8_share * layout.layers(shape) * layer_matrices(shape, layout)
        sent -= in_fp8 * (shape.bytes - 1) * (ranks - 1) / ranks
    return sent, _send(sent, 2, layout.tp, ranks, gpu)


def _optimizer_seconds(shape: Shape, layout: Layout, gpu: Gpu) -> float:
    """Bound by memory: gradient, master weight, moments are read, all but the gradient written; the EMA.

    What is offloaded passes the host's memory instead; its gradient crosses the link, its weight comes back.
    """
    parameters = max(rank_parameters(shape, layout, stage) for stage in (0, layout.pp - 1))
    owned = parameters / optimizer_shards(shape, layout)
    updated = 4 + 12 + 12 + (12 if shape.ema else 0)
    on_gpu = owned * (1 - shape.offloaded) * (updated + shape.bytes)
    norm_and_zero = 4 * owned + 4 * parameters  # of the gradients
    on_host = owned * shape.offloaded * (updated / HOST_MEMORY + (4 + shape.bytes) / HOST_LINK)
    return (on_gpu + norm_and_zero) / (gpu.memory_bandwidth * MEMORY_EFFICIENCY) + on_host


def _send(sent: float, calls: int, stride: int, ranks: int, gpu: Gpu) -> float:
    """Seconds of `calls` operations that send `sent` bytes in all, in a group of `ranks`, `stride` apart."""
    if ranks == 1:
        return 0.0
    inside = stride * ranks <= gpu.per_node
    return calls * LATENCY + sent / ((gpu.link if inside else gpu.network) * LINK_EFFICIENCY)
