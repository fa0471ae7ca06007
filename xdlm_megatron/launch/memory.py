"""Bytes of one GPU by part, on the stage that needs most.

Counted from what Megatron-Core and this package keep: tests/unit/launch measures weights, gradients,
optimizer, EMA, activations and logits on real models, rank by rank. Not counted: temporary tensors of a
kernel, fragments of the allocator, libraries. RESERVE stands for them.

t is the tokens of a micro-batch on one context-parallel rank, e the bytes of an activation, p those of what a
product of a layer keeps: 1 in FP8. What Transformer Engine keeps is counted from its code alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdlm_megatron.launch.gpus import GIB
from xdlm_megatron.launch.layout import FUSED_CHUNK, Layout, Shape

RESERVE = 3 * GIB  # CUDA context, NCCL, cuBLAS workspaces, fragmentation
MAIN, MOMENTS, GRADIENT, AVERAGE = 4, 8, 4, 4  # float32 bytes a parameter


@dataclass(frozen=True)
class Memory:
    """Bytes by part. working: gradients (and what is recomputed) of the layer that backward is in."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    working: float
    head_and_loss: float
    reserve: float = RESERVE

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


def stage_memory(shape: Shape, layout: Layout) -> Memory:
    """Of the first or the last pipeline stage, whichever needs more."""
    return max((_of_stage(shape, layout, stage) for stage in {0, layout.pp - 1}), key=lambda m: m.total)


def _of_stage(shape: Shape, layout: Layout, stage: int) -> Memory:
    parameters = rank_parameters(shape, layout, stage)
    on_gpu = parameters / optimizer_shards(shape, layout) * (1 - shape.offloaded)
    main = MAIN if shape.dtype == "bfloat16" else 0  # float32 weights are their own master
    last = stage == layout.pp - 1
    layer = layer_activations(shape, layout, "none")
    return Memory(
        weights=parameters * shape.bytes + fp8_copies(shape, layout),
        gradients=parameters * GRADIENT,
        optimizer=on_gpu * (main + MOMENTS),
        ema=on_gpu * AVERAGE if shape.ema else 0,
        activations=stage_activations(shape, layout, stage),
        working=layer * (2 if layout.recompute == "full" else 1),
        head_and_loss=head_bytes(shape, layout) if last else 0,
    )


def host_bytes(shape: Shape, layout: Layout) -> float:
    """Of the CPU's memory for one GPU: offloaded float32 weights, moments, gradients and averages."""
    parameters = max(rank_parameters(shape, layout, stage) for stage in (0, layout.pp - 1))
    each = MAIN + MOMENTS + GRADIENT + (AVERAGE if shape.ema else 0)
    return parameters / optimizer_shards(shape, layout) * shape.offloaded * each


def optimizer_shards(shape: Shape, layout: Layout) -> int:
    """Processes that share the optimizer's state of a parameter."""
    return layout.dp * layout.cp if shape.distributed_optimizer else 1


def rank_parameters(shape: Shape, layout: Layout, stage: int) -> int:
    """Parameters of a process of the stage: matrices split over tensor parallelism, norms whole."""
    tp = layout.tp
    norms = 2 * shape.hidden + (2 * shape.head if shape.qk_layernorm else 0)
    embedding = layout.padded_vocab(shape) // tp * shape.hidden
    total = layout.layers(shape) * (layer_matrices(shape, layout) + norms)
    if stage == 0:
        total += embedding
    if stage == layout.pp - 1:
        total += shape.hidden  # the final norm
        if not (shape.tied and layout.pp == 1):
            total += embedding  # a tied head has a copy of its own where it is on another stage
    return total


def layer_matrices(shape: Shape, layout: Layout) -> int:
    """Elements of one layer's matrices on a process."""
    return shape.hidden * (2 * shape.query + 2 * shape.key + 3 * shape.ffn) // layout.tp


def fp8_copies(shape: Shape, layout: Layout) -> float:
    """Bytes that FP8 adds to weights: a copy and its transpose, beside bfloat16's or, gathered, alone."""
    if shape.fp8_param_gather:
        return 0
    return 2 * shape.fp8_share * layout.layers(shape) * layer_matrices(shape, layout)


def layer_activations(
    shape: Shape, layout: Layout, recompute: str | None = None, fused_norms: bool = True
) -> float:
    """What one layer keeps for its backward pass, for one micro-batch; the mean where some are in FP8.

    fused_norms: RMSNorm is one kernel, as on CUDA; on a CPU it is several, which keep copies.
    """
    recompute = layout.recompute if recompute is None else recompute
    t, e, tp = layout.tokens(shape), shape.bytes, layout.tp
    p = e - shape.fp8_share * (e - 1)
    residual = t * shape.hidden / layout.sequence_slices
    if recompute == "full":
        return residual * e
    query, key, ffn = (t * width / tp for width in (shape.query, shape.key, shape.ffn))
    heads, groups = t * shape.heads / tp, t * shape.groups / tp
    total = 2 * (residual * p + _norm(residual, t / layout.sequence_slices, e, fused_norms))
    if layout.cp == 1 or (shape.qk_layernorm and (fused_norms or e == 4)):
        total += (query + 2 * key) * e  # the product with W_qkv, while a view of a part of it is kept
    if shape.qk_layernorm:
        copied = shape.heads != shape.groups and shape.groups > tp  # grouped queries, to be reshaped
        copies = query if copied else 0
        if fused_norms:
            total += copies * e + 4 * (heads + groups)
        else:
            plain = 4 * (query + key)  # the normalised values; of bfloat16 a float32 copy as well
            total += plain + (copies * e if e == 4 else plain) + 4 * (heads + groups)
    total += query * e + key * layout.cp * e  # rotated; keys (and values) of the whole sequence
    total += key * layout.cp * e if layout.cp > 1 else 0
    total += query * e + 4 * heads  # attention's output and its log-sum-exp
    total += query * shape.fp8_share  # and that output again, in FP8
    positions = t if shape.masked else shape.seq_length / layout.cp
    total += 4 * positions * shape.head * e  # cosines and sines of q and k
    if shape.masked:
        total += t * shape.seq_length * e  # the mask, added to the scores
    if shape.dropout:
        total += 2 * residual * (1 if fused_norms else e)
    if recompute == "mlp":
        return total
    # Gate and value, and their product; unfused also the gate's sigmoid and what of it was multiplied.
    return total + ffn * ((2 * e + p) if shape.engine else 5 * e)


def _norm(elements: float, rows: float, e: int, fused: bool) -> float:
    """Of an RMSNorm: its input and the rows' scales; unfused also the normalised input, all in float32."""
    return elements * e + 4 * rows if fused else 8 * elements + 4 * rows


def stage_activations(shape: Shape, layout: Layout, stage: int) -> float:
    """Of all micro-batches that the stage has in flight."""
    microbatches = layout.microbatches(shape)
    per_chunk = layout.layers(shape) // layout.vpp
    if layout.vpp > 1:
        ahead = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
        in_flight = min(microbatches * layout.vpp, ahead)
    else:
        in_flight = min(microbatches, layout.pp - stage)
    residual = layout.tokens(shape) * shape.hidden / layout.sequence_slices * shape.bytes
    sent = residual if layout.pp > 1 else 0  # what was sent on stays until its gradient is back
    return in_flight * (per_chunk * layer_activations(shape, layout) + sent)


def head_bytes(shape: Shape, layout: Layout) -> float:
    """Final norm, head and loss of one micro-batch; the gradient of logits takes their place."""
    t, e = layout.tokens(shape), shape.bytes
    hidden, shard = t * shape.hidden * e, layout.padded_vocab(shape) // layout.tp
    kept = (
        hidden / layout.sequence_slices + hidden + 4 * 6 * t
    )  # the norm's input and output; rows of the loss
    if not layout.fuses_head(shape):
        return kept + t * shard * e
    # The gradient of the hidden states, and a chunk of logits; the weight's goes straight to the sum.
    return kept + hidden + min(t, max(1, FUSED_CHUNK // shard)) * shard * e
