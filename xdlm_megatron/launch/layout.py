"""A recipe as the planner sees it: the sizes of its model, and the layouts that could train it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from xdlm_megatron.config.derive import (
    consumed_after,
    data_parallel_size,
    flops_per_token,
    head_fusion,
    keeps_documents_apart,
    kv_channels,
    num_parameters,
    num_query_groups,
    pad_vocab_size,
)
from xdlm_megatron.config.gpu_rules import FP8_MULTIPLE
from xdlm_megatron.config.schema import RunConfig

Recompute = Literal["none", "mlp", "full"]
FuseHead = Literal["auto", "always", "never"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "mlp", "full")
MAX_CONTEXT = 32
FUSED_CHUNK = 1 << 27  # elements of logits at once: diffusion/head_nelbo.py, CHUNK_ELEMENTS["cuda"]


@dataclass(frozen=True)
class Shape:
    """What of a recipe costs memory and time. query, key: widths of all query and all key heads.

    masks_only: uniform_ratio is 0. batch_unit: divides every batch of a ramp-up; global_batch without one.
    engine: the recipe asks for Transformer Engine's layers. fp8_layers: those whose products are in FP8.
    multiple: of all sides of a product, and of a sequence. offloaded: share of the optimizer on the CPU.
    """

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocab_size: int
    vocab_unit: int
    seq_length: int
    qk_layernorm: bool
    tied: bool
    dropout: bool
    masked: bool
    dtype: str
    distributed_optimizer: bool
    offloaded: float
    ema: bool
    masks_only: bool
    global_batch: int
    batch_unit: int
    total_tokens: int
    num_parameters: int
    flops_per_token: float
    engine: bool
    fp8_layers: int
    fp8_param_gather: bool
    multiple: int

    @classmethod
    def of(cls, config: RunConfig) -> Shape:
        model, data, precision, optimizer = config.model, config.data, config.precision, config.optimizer
        in_bf16 = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
        return cls(
            num_layers=model.num_layers,
            hidden=model.hidden_size,
            ffn=model.ffn_hidden_size,
            heads=model.num_attention_heads,
            groups=num_query_groups(config),
            head=kv_channels(config),
            vocab_size=data.vocab_size,
            vocab_unit=data.make_vocab_size_divisible_by,
            seq_length=data.seq_length,
            qk_layernorm=model.qk_layernorm,
            tied=model.share_embeddings_and_output_weights,
            dropout=model.hidden_dropout > 0,
            masked=keeps_documents_apart(data),
            dtype=config.precision.dtype,
            distributed_optimizer=optimizer.use_distributed_optimizer,
            offloaded=optimizer.optimizer_offload_fraction if optimizer.optimizer_cpu_offload else 0.0,
            ema=optimizer.ema_decay > 0,
            masks_only=config.diffusion.uniform_ratio == 0,
            global_batch=config.train.global_batch_size,
            batch_unit=math.gcd(config.train.global_batch_size, *(config.train.rampup_batch_size or ())[:2]),
            total_tokens=consumed_after(config.train, config.train.num_steps) * data.seq_length,
            num_parameters=num_parameters(config),
            flops_per_token=flops_per_token(config),
            engine=model.transformer_impl == "transformer_engine" or precision.fp8 is not None,
            fp8_layers=model.num_layers - in_bf16 if precision.fp8 else 0,
            fp8_param_gather=precision.fp8_param_gather,
            multiple=FP8_MULTIPLE[precision.fp8_recipe] if precision.fp8 else 1,
        )

    @property
    def fp8_share(self) -> float:
        """Of the layers."""
        return self.fp8_layers / self.num_layers

    @property
    def query(self) -> int:
        return self.heads * self.head

    @property
    def key(self) -> int:
        return self.groups * self.head

    @property
    def bytes(self) -> int:
        """Of a parameter or an activation."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_length


@dataclass(frozen=True)
class Layout:
    """How `world` processes share the work; dp is what the other sizes leave."""

    world: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    recompute: Recompute = "none"
    fuse_head: FuseHead = "auto"

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def sequence_slices(self) -> int:
        """Tensor-parallel ranks over which norms and residuals are split."""
        return self.tp if self.sequence_parallel else 1

    def microbatches(self, shape: Shape) -> int:
        return shape.global_batch // (self.micro_batch * self.dp)

    def tokens(self, shape: Shape) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch * shape.seq_length // self.cp

    def layers(self, shape: Shape) -> int:
        """Layers of a pipeline stage."""
        return shape.num_layers // self.pp

    def padded_vocab(self, shape: Shape) -> int:
        return pad_vocab_size(shape.vocab_size, shape.vocab_unit, self.tp)

    def fuses_head(self, shape: Shape) -> bool:
        """Head and loss together, by the rule of diffusion/head_nelbo.py: fusing_pays."""
        if self.fuse_head != "auto":
            return self.fuse_head == "always"
        columns = self.padded_vocab(shape) // self.tp
        return shape.masks_only or self.tokens(shape) * columns > FUSED_CHUNK

    def overrides(self) -> list[str]:
        """The layout as a recipe's overrides."""
        names = {
            "parallel.tensor_model_parallel_size": str(self.tp),
            "parallel.pipeline_model_parallel_size": str(self.pp),
            "parallel.virtual_pipeline_model_parallel_size": str(self.vpp) if self.vpp > 1 else "null",
            "parallel.context_parallel_size": str(self.cp),
            "parallel.sequence_parallel": str(self.sequence_parallel).lower(),
            "train.micro_batch_size": str(self.micro_batch),
            "train.fuse_head": self.fuse_head,
        }
        fields = {
            "none": {"granularity": "null"},
            "mlp": {"granularity": "selective", "modules": "[mlp]"},
            "full": {"granularity": "full", "method": "uniform", "num_layers": "1"},
        }[self.recompute]
        names |= {f"model.mcore.recompute_{key}": value for key, value in fields.items()}
        return [f"{name}={value}" for name, value in names.items()]


def recipe_layout(config: RunConfig, world: int) -> Layout:
    """The layout that the recipe asks for. Raises ValueError where `world` is no multiple of it."""
    parallel = config.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    data_parallel_size(world, *sizes)
    return Layout(
        world,
        *sizes[:2],
        vpp=parallel.virtual_pipeline_model_parallel_size or 1,
        cp=sizes[2],
        sequence_parallel=parallel.sequence_parallel,
        micro_batch=config.train.micro_batch_size,
        recompute=recipe_recompute(config),
        fuse_head=head_fusion(config),
    )


def recipe_recompute(config: RunConfig) -> Recompute:
    """What the recipe's `model.mcore` recomputes, as near as the planner knows it."""
    mcore = config.model.mcore
    if mcore.get("recompute_granularity") == "full":
        return "full"
    modules = mcore.get("recompute_modules") or []
    return "mlp" if mcore.get("recompute_granularity") == "selective" and "mlp" in modules else "none"


def not_priced(config: RunConfig) -> list[str]:
    """What of `model.mcore` the planner does not know, or knows only roughly."""
    mcore = config.model.mcore
    exact = {"recompute_method": "uniform", "recompute_num_layers": 1, "recompute_modules": ["mlp"]}
    known = {"recompute_granularity", *(name for name, value in exact.items() if mcore.get(name) == value)}
    planned = recipe_recompute(config)
    return [
        f"model.mcore.{name}={value}"
        + (f" is planned as recompute {planned}" if name.startswith("recompute") else " is not priced")
        for name, value in mcore.items()
        if name not in known and value is not None
    ]


def all_layouts(shape: Shape, world: int, per_node: int, fuse_head: FuseHead) -> Iterator[Layout]:
    """Every layout of `world` processes that the model's sizes and the batch divide into.

    Tensor parallelism stays within a node and takes sequence parallelism where the sequence divides.
    """
    widths = shape.ffn, shape.query, shape.query + 2 * shape.key
    for tp in _divisors(world, per_node):
        if shape.heads % tp or shape.groups % tp or any(width % (tp * shape.multiple) for width in widths):
            continue
        for pp in _divisors(world // tp, shape.num_layers):
            if shape.num_layers % pp:
                continue
            for cp in _divisors(world // (tp * pp), MAX_CONTEXT):
                if shape.seq_length % (cp * shape.multiple):
                    continue
                base = Layout(
                    world,
                    tp=tp,
                    pp=pp,
                    cp=cp,
                    sequence_parallel=tp > 1 and shape.seq_length % (cp * tp) == 0,
                    fuse_head=fuse_head,
                )
                yield from _batched(shape, base)


def _batched(shape: Shape, base: Layout) -> Iterator[Layout]:
    """The layout with every micro-batch size, recomputation and interleaving that it allows."""
    if shape.batch_unit % base.dp:
        return
    per_rank = shape.batch_unit // base.dp
    for micro_batch in _divisors(per_rank, 64):
        microbatches = per_rank // micro_batch
        for vpp in _divisors(base.layers(shape), 8):
            if vpp > 1 and (base.pp == 1 or microbatches % base.pp):
                continue
            for recompute in RECOMPUTES:
                yield replace(base, micro_batch=micro_batch, vpp=vpp, recompute=recompute)


def _divisors(number: int, largest: int) -> list[int]:
    return [n for n in range(1, min(number, largest) + 1) if number % n == 0]
