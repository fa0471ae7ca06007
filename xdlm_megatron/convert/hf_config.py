"""The config.json of a Hugging Face folder: what it fixes of a recipe, and which networks are not ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xdlm_megatron.config.derive import kv_channels, num_query_groups
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.convert.names import LLADA, LLAMA

Json = dict[str, Any]


class ConvertError(ValueError):
    """A folder or recipe that cannot be converted; the message names every fault and the cure."""


@dataclass(frozen=True)
class Family:
    """Networks that are written alike.

    names: of their tensors. fixed: keys of config.json with the one value that our network computes, and the
    value where the key is absent. read: config.json -> fields of a recipe; write: the inverse.
    """

    names: dict[str, str]
    fixed: dict[str, tuple[Any, Any]]
    read: Callable[[Json], Json]
    write: Callable[[RunConfig, int | None], Json]


def _read_llada(hf: Json) -> Json:
    width, heads = hf["d_model"], hf["n_heads"]
    return {
        "model.num_layers": hf["n_layers"],
        "model.hidden_size": width,
        "model.ffn_hidden_size": hf.get("mlp_hidden_size") or hf.get("mlp_ratio", 4) * width,
        "model.num_attention_heads": heads,
        "model.num_query_groups": hf.get("n_kv_heads") or heads,
        "model.kv_channels": width // heads,
        "model.qk_layernorm": False,
        "model.share_embeddings_and_output_weights": hf.get("weight_tying", True),
        "model.rotary_base": hf.get("rope_theta", 10_000),
        "model.layernorm_epsilon": hf.get("rms_norm_eps", 1e-5),
        "data.vocab_size": hf.get("embedding_size") or hf["vocab_size"],
        "data.mask_id": hf.get("mask_token_id"),
    }


def _write_llada(config: RunConfig, eod_id: int | None) -> Json:
    model, data = config.model, config.data
    if model.qk_layernorm or kv_channels(config) * model.num_attention_heads != model.hidden_size:
        raise ConvertError(
            f"LLaDA has no norms on queries and keys (model.qk_layernorm={model.qk_layernorm}) and heads of "
            f"width hidden_size / num_attention_heads (model.kv_channels={model.kv_channels}); "
            "add --names llama"
        )
    fixed = {key: value for key, (value, _) in FAMILIES["llada"].fixed.items()}
    return fixed | {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        # The code that reads the folder stays where it was published.
        "auto_map": {
            "AutoConfig": "GSAI-ML/LLaDA-8B-Base--configuration_llada.LLaDAConfig",
            "AutoModel": "GSAI-ML/LLaDA-8B-Base--modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "GSAI-ML/LLaDA-8B-Base--modeling_llada.LLaDAModelLM",
        },
        "n_layers": model.num_layers,
        "d_model": model.hidden_size,
        "mlp_hidden_size": model.ffn_hidden_size,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": num_query_groups(config),
        "weight_tying": model.share_embeddings_and_output_weights,
        "rope_theta": float(model.rotary_base),
        "rms_norm_eps": model.layernorm_epsilon,
        "vocab_size": data.vocab_size,
        "embedding_size": data.vocab_size,
        "mask_token_id": data.mask_id,
        "max_sequence_length": data.seq_length,
        "residual_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "embedding_dropout": 0.0,
        "attention_layer_norm_with_affine": True,
        "rope_full_precision": True,
        "flash_attention": False,
        "use_cache": False,
        "init_device": "meta",
        "eos_token_id": eod_id,
        "pad_token_id": eod_id,
    }


def _read_llama(hf: Json) -> Json:
    heads = hf["num_attention_heads"]
    rope = hf.get("rope_parameters") or hf  # transformers 5 nests it
    return {
        "model.num_layers": hf["num_hidden_layers"],
        "model.hidden_size": hf["hidden_size"],
        "model.ffn_hidden_size": hf["intermediate_size"],
        "model.num_attention_heads": heads,
        "model.num_query_groups": hf.get("num_key_value_heads") or heads,
        "model.kv_channels": hf.get("head_dim") or hf["hidden_size"] // heads,
        "model.qk_layernorm": "qwen3" in hf["model_type"],
        "model.share_embeddings_and_output_weights": hf.get("tie_word_embeddings", False),
        "model.rotary_base": rope.get("rope_theta", 10_000),
        "model.layernorm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "data.vocab_size": hf["vocab_size"],
        "data.mask_id": hf.get("mask_token_id"),
    }


def _write_llama(config: RunConfig, eod_id: int | None) -> Json:
    model, data = config.model, config.data
    kind = "qwen3" if model.qk_layernorm else "llama"
    fixed = {key: value for key, (value, _) in FAMILIES["llama"].fixed.items()}
    return fixed | {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(config),
        "head_dim": kv_channels(config),
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "rope_theta": float(model.rotary_base),
        "rms_norm_eps": model.layernorm_epsilon,
        "vocab_size": data.vocab_size,
        "mask_token_id": data.mask_id,
        "max_position_embeddings": data.seq_length,
        "attention_dropout": model.attention_dropout,
        "use_cache": False,
        "eos_token_id": eod_id,
        "pad_token_id": eod_id,
    }


# A further family is an entry here; its names and config.json are all that it may differ in.
FAMILIES = {
    "llada": Family(
        LLADA,
        fixed={
            "block_type": ("llama", "sequential"),
            "block_group_size": (1, 1),
            "activation_type": ("silu", "swiglu"),
            "layer_norm_type": ("rms", "default"),
            "layer_norm_with_affine": (True, True),
            "attention_layer_norm": (False, False),
            "bias_for_layer_norm": (False, False),
            "include_bias": (False, False),
            "include_qkv_bias": (False, False),
            "input_emb_norm": (False, False),
            "scale_logits": (False, False),
            "alibi": (False, False),
            "rope": (True, False),
        },
        read=_read_llada,
        write=_write_llada,
    ),
    "llama": Family(
        LLAMA,
        fixed={
            "hidden_act": ("silu", "silu"),
            "attention_bias": (False, False),
            "mlp_bias": (False, False),
            "rope_scaling": (None, None),
            "use_sliding_window": (False, False),
        },
        read=_read_llama,
        write=_write_llama,
    ),
}


def family_of(hf: Json, path: Path) -> Family:
    """By its `model_type`. Raises ConvertError for one that is not known or computes something else."""
    kind = str(hf.get("model_type"))
    # Diffusion models that were made of Llama or Qwen3 say so behind a prefix, as in a2d-qwen3.
    name = "llada" if kind == "llada" else "llama" if kind.endswith(("llama", "qwen3")) else None
    if name is None:
        raise ConvertError(f"{path}: model_type={kind!r} must be llada, llama or qwen3; no other is known")
    family = FAMILIES[name]
    wrong = [
        f"  {key}={hf.get(key, absent)!r} must be {value!r}"
        for key, (value, absent) in family.fixed.items()
        if (hf.get(key, absent) or False) != (value or False)
    ]
    if (hf.get("rope_parameters") or {}).get("rope_type", "default") != "default":
        wrong.append(f"  rope_parameters={hf['rope_parameters']!r} must be of type 'default'")
    if wrong:
        raise ConvertError("\n".join([f"{path}: our network does not compute this one", *wrong]))
    return family


def fields_of(hf: Json, family: Family, path: Path) -> Json:
    """What config.json says of a recipe: {"model.num_layers": 32, ...}, without what it leaves open."""
    try:
        fields = family.read(hf)
    except KeyError as error:
        raise ConvertError(
            f"{path}: {error.args[0]} is missing; take the file that belongs to the weights"
        ) from None
    except (TypeError, ZeroDivisionError) as error:
        raise ConvertError(
            f"{path}: a size is no number above 0 ({error}); take the file that belongs to the weights"
        ) from None
    base = fields["model.rotary_base"]
    fields["model.rotary_base"] = int(base) if isinstance(base, float) and base.is_integer() else base
    return {name: value for name, value in fields.items() if value is not None}


def check_recipe(config: RunConfig, fields: Json, path: Path) -> None:
    """Refuses a recipe of another network; names every field that differs."""
    resolved = {
        "model.num_query_groups": num_query_groups(config),
        "model.kv_channels": kv_channels(config),
    }
    found = {name: resolved.get(name, _field(config, name)) for name in fields}
    found["model.mcore.rotary_interleaved"] = config.model.mcore.get("rotary_interleaved", False)
    wanted = fields | {"model.mcore.rotary_interleaved": False}
    wrong = [
        f"  {name}={found[name]!r} must be {value!r}"
        for name, value in wanted.items()
        if found[name] != value
    ]
    if wrong:
        noun = "field" if len(wrong) == 1 else "fields"
        cure = "change them, or print the sections that fit by --write-recipe"
        first = f"the recipe is of another network than {path}: {len(wrong)} {noun}; {cure}"
        raise ConvertError("\n".join([first, *wrong]))


def as_sections(fields: Json) -> str:
    """YAML of the fields, to be put into a recipe."""
    tree: dict[str, Json] = {}
    for name, value in fields.items():
        section, _, field = name.partition(".")
        tree.setdefault(section, {})[field] = value
    return yaml.safe_dump(tree, sort_keys=False)


def _field(config: RunConfig, dotted: str) -> Any:
    section, _, field = dotted.partition(".")
    return getattr(getattr(config, section), field)
