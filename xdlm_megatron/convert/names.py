"""A network's parameters by two names: Megatron-Core's, which are ours, and those of a Hugging Face folder.

Shapes: H hidden, F inner width, V vocabulary, N query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xdlm_megatron.config.derive import kv_channels, num_query_groups
from xdlm_megatron.config.schema import RunConfig

# Our parameter, whose {} is the layer: the parts that a Hugging Face folder keeps apart, in their order.
# Megatron-Core fuses queries, keys and values, and the gate of SwiGLU with what it gates.
PARAMETERS = {
    "embedding.word_embeddings.weight": ("embedding",),
    "decoder.layers.{}.input_layernorm.weight": ("input_norm",),
    "decoder.layers.{}.self_attention.linear_qkv.weight": ("query", "key", "value"),
    "decoder.layers.{}.self_attention.q_layernorm.weight": ("query_norm",),
    "decoder.layers.{}.self_attention.k_layernorm.weight": ("key_norm",),
    "decoder.layers.{}.self_attention.linear_proj.weight": ("attention_output",),
    "decoder.layers.{}.pre_mlp_layernorm.weight": ("mlp_norm",),
    "decoder.layers.{}.mlp.linear_fc1.weight": ("gate", "up"),
    "decoder.layers.{}.mlp.linear_fc2.weight": ("down",),
    "decoder.final_layernorm.weight": ("final_norm",),
    "output_layer.weight": ("head",),
}

# modeling_llada.py: OLMo's names. `ff_proj` goes through SiLU and `up_proj` does not; the `ff_out` of a block
# is its second matrix, that of the model is the head. It has no norms on queries and keys.
LLADA = {
    "embedding": "model.transformer.wte.weight",
    "input_norm": "model.transformer.blocks.{}.attn_norm.weight",
    "query": "model.transformer.blocks.{}.q_proj.weight",
    "key": "model.transformer.blocks.{}.k_proj.weight",
    "value": "model.transformer.blocks.{}.v_proj.weight",
    "attention_output": "model.transformer.blocks.{}.attn_out.weight",
    "mlp_norm": "model.transformer.blocks.{}.ff_norm.weight",
    "gate": "model.transformer.blocks.{}.ff_proj.weight",
    "up": "model.transformer.blocks.{}.up_proj.weight",
    "down": "model.transformer.blocks.{}.ff_out.weight",
    "final_norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
}

# transformers' LlamaForCausalLM; with the norms on queries and keys, Qwen3ForCausalLM.
LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "input_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "query_norm": "model.layers.{}.self_attn.q_norm.weight",
    "key_norm": "model.layers.{}.self_attn.k_norm.weight",
    "attention_output": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}


@dataclass(frozen=True)
class Part:
    """A tensor of a Hugging Face folder."""

    name: str
    shape: tuple[int, ...]


def parts_of(config: RunConfig, names: dict[str, str]) -> dict[str, tuple[Part, ...]]:
    """Our parameters, by name, each with the tensors that it is made of.

    names: LLADA or LLAMA.
    """
    shapes = _shapes(config)
    absent = set()
    if not config.model.qk_layernorm:
        absent |= {"query_norm", "key_norm"}
    if config.model.share_embeddings_and_output_weights:
        absent.add("head")
    found = {}
    for ours, parts in PARAMETERS.items():
        if absent.intersection(parts):
            continue
        for layer in range(config.model.num_layers if "{}" in ours else 1):
            found[ours.format(layer)] = tuple(Part(names[p].format(layer), shapes[p]) for p in parts)
    return found


def join(tensors: Sequence[Tensor], num_query_groups: int) -> Tensor:
    """Our parameter from its parts.

    Queries [N D, H], keys and values [G D, H] interleave by group, as Megatron-Core splits them over tensor
    parallelism: of each group its N / G queries, its key, its value. Others lie end to end.
    """
    if len(tensors) == 3:
        tensors = [x.unflatten(0, (num_query_groups, -1)) for x in tensors]
        return torch.cat(tensors, dim=1).flatten(0, 1)
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def split(parameter: Tensor, parts: Sequence[Part], num_query_groups: int) -> list[Tensor]:
    """The inverse of `join`; rows of the padded vocabulary are left out."""
    rows = [part.shape[0] for part in parts]
    if len(parts) == 3:
        groups = parameter.unflatten(0, (num_query_groups, -1))
        pieces = groups.split([n // num_query_groups for n in rows], dim=1)
        return [piece.flatten(0, 1) for piece in pieces]
    return list(parameter[: sum(rows)].split(rows))


def _shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    model, D = config.model, kv_channels(config)
    H, F, V = model.hidden_size, model.ffn_hidden_size, config.data.vocab_size
    query, key = model.num_attention_heads * D, num_query_groups(config) * D
    return {
        "embedding": (V, H),
        "input_norm": (H,),
        "query": (query, H),
        "key": (key, H),
        "value": (key, H),
        "query_norm": (D,),
        "key_norm": (D,),
        "attention_output": (H, query),
        "mlp_norm": (H,),
        "gate": (F, H),
        "up": (F, H),
        "down": (H, F),
        "final_norm": (H,),
        "head": (V, H),
    }
