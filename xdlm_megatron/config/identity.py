"""What of a recipe makes it this experiment, or this network, and what may change while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xdlm_megatron.config.gpu_rules import FP8_MCORE_FIELDS
from xdlm_megatron.config.load import to_tree
from xdlm_megatron.config.schema import RunConfig

# A resume that changes one of these would go on as another experiment.
FIXED_FIELDS = (
    "run.seed",
    "diffusion",
    "model",
    "precision",
    "data",
    "optimizer",
    "lr_schedule",
    "train.num_steps",
    "train.global_batch_size",
    "train.rampup_batch_size",
    "train.init_from",
)
# Where the same data lies (`check_same_data` looks at what it is), how its vocabulary is padded, who computes
# the layers and in how many bits, and what of Megatron's fields decides memory, kernels and messages alone
# may change with the machine or the layout.
FREE_FIELDS = (
    "data.train_prefix",
    "data.valid_prefix",
    "data.tokenizer",
    "data.make_vocab_size_divisible_by",
    "model.transformer_impl",
    "precision.fp8",
    "precision.fp8_recipe",
    "precision.fp8_param_gather",
    "precision.num_layers_at_start_in_bf16",
    "precision.num_layers_at_end_in_bf16",
    "optimizer.optimizer_cpu_offload",
    "optimizer.optimizer_offload_fraction",
    *(
        f"model.mcore.{name}"
        for name in (
            "recompute_granularity",
            "recompute_method",
            "recompute_num_layers",
            "recompute_modules",
            "distribute_saved_activations",
            "num_microbatches_with_partial_activation_checkpoints",
            "deallocate_pipeline_outputs",
            "apply_rope_fusion",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "gradient_accumulation_fusion",
            "deterministic_mode",
            "batch_p2p_comm",
            "batch_p2p_sync",
            "overlap_p2p_comm",
            "microbatch_group_size_per_vp_stage",
            "tp_comm_overlap",
            "cpu_offloading",
            "cpu_offloading_num_layers",
            "cpu_offloading_activations",
            "cpu_offloading_weights",
            "cuda_graph_impl",
            *FP8_MCORE_FIELDS,
        )
    ),
)
# Of `model`, how it learns and not what it computes.
LEARNING_FIELDS = (
    "model.hidden_dropout",
    "model.attention_dropout",
    "model.init_method_std",
    "model.zero_init_head",
)

Change = tuple[str, Any, Any]  # dotted field, value before, value now


def changed_fields(before: RunConfig, now: RunConfig) -> list[Change]:
    """Every field with which it is another experiment; none: the same."""
    return _changes(
        to_tree(before), to_tree(now), lambda name: any(_is_in(name, fixed) for fixed in FIXED_FIELDS)
    )


def changed_network(saved: dict[str, Any], now: RunConfig, with_noise: bool) -> list[Change]:
    """Every field with which the weights of a checkpoint mean another thing; none: they fit.

    A knob that the checkpoint does not know yet had no effect.

    Args:
        saved: the recipe in the checkpoint, a tree.
        with_noise: the noise is part of what they mean.
    """
    known = flat(saved)

    def counts(name: str) -> bool:
        if _is_in(name, "model.mcore"):  # what is not written there has Megatron's default
            return True
        of_network = _is_in(name, "model") and name not in LEARNING_FIELDS
        of_states = name in ("data.vocab_size", "data.mask_id")
        return name in known and (of_network or of_states or (with_noise and _is_in(name, "diffusion")))

    return _changes(saved, to_tree(now), counts)


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Fields by dotted name; an empty section has none."""
    fields: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            fields[prefix] = value

    walk("", tree)
    return fields


def _changes(before: dict[str, Any], now: dict[str, Any], counts: Callable[[str], bool]) -> list[Change]:
    old, new = flat(before), flat(now)
    return [
        (name, old.get(name), new.get(name))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in FREE_FIELDS and counts(name)
    ]


def _is_in(name: str, section: str) -> bool:
    return name == section or name.startswith(f"{section}.")
