"""LLaDA's network in plain torch over the tensors of its Hugging Face folder, as modeling_llada.py has it.

Pre-norm blocks with RMSNorm; rotary positions that turn the two halves of a head (rotate_half); attention in
both directions; silu(ff_proj x) * up_proj x; no bias anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu, softmax

# The config.json of GSAI-ML/LLaDA-8B-Base, its sizes made small; two query heads share a key head.
TINY: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 45,
    "eos_token_id": 43,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 44,
    "max_sequence_length": 12,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 4,
    "pad_token_id": 43,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 45,
    "weight_tying": False,
}


def make_weights(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random ones, large enough that attention is far from uniform and every norm matters."""
    width, inner = config["d_model"], config["mlp_hidden_size"]
    keys = width // config["n_heads"] * config["n_kv_heads"]
    block = {
        "attn_norm": (width,),
        "q_proj": (width, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "attn_out": (width, width),
        "ff_norm": (width,),
        "ff_proj": (inner, width),
        "up_proj": (inner, width),
        "ff_out": (width, inner),
    }
    shapes = {"wte": (config["embedding_size"], width), "ln_f": (width,)}
    for layer in range(config["n_layers"]):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    if not config["weight_tying"]:
        shapes["ff_out"] = (config["embedding_size"], width)
    if config["attention_layer_norm"]:
        for layer in range(config["n_layers"]):
            shapes |= {f"blocks.{layer}.{x}_norm": (width // config["n_heads"],) for x in "qk"}
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.transformer.{name}.weight": (
            torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        ).to(dtype)
        for name, shape in shapes.items()
    }


def write_folder(path: Path, config: dict[str, Any], weights: dict[str, Tensor], num_shards: int = 1) -> Path:
    """As Hugging Face writes it: tensors of a layer may lie in different shards."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    files = [f"model-{n + 1:05d}-of-{num_shards:05d}.safetensors" for n in range(num_shards)]
    if num_shards == 1:
        files = ["model.safetensors"]
    weight_map = {name: files[n % num_shards] for n, name in enumerate(sorted(weights))}
    for file in files:
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, path / file)
    if num_shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids_BS: Tensor) -> Tensor:
    """[B, S, V] in the dtype of the weights."""
    heads, kv_heads = config["n_heads"], config["n_kv_heads"]
    (B, S), width = ids_BS.shape, config["d_model"]
    D = width // heads
    w = {name.removeprefix("model.transformer.").removesuffix(".weight"): x for name, x in weights.items()}

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])

    frequency = config["rope_theta"] ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle_SD = (torch.arange(S, dtype=torch.float64)[:, None] * frequency).repeat(1, 2).to(w["wte"].dtype)

    def rotate(x_BNSD: Tensor) -> Tensor:
        first, second = x_BNSD.chunk(2, dim=-1)
        return x_BNSD * angle_SD.cos() + torch.cat([-second, first], dim=-1) * angle_SD.sin()

    def by_head(x: Tensor, count: int) -> Tensor:
        return x.view(B, S, count, D).transpose(1, 2).repeat_interleave(heads // count, dim=1)

    x = w["wte"][ids_BS]
    for layer in range(config["n_layers"]):
        b = {n.removeprefix(f"blocks.{layer}."): t for n, t in w.items() if n.startswith(f"blocks.{layer}.")}
        h = norm(x, b["attn_norm"])
        q, k = by_head(h @ b["q_proj"].T, heads), by_head(h @ b["k_proj"].T, kv_heads)
        if config["attention_layer_norm"]:  # a head at a time: Qwen3's, which LLaDA's own would not be
            q, k = norm(q, b["q_norm"]), norm(k, b["k_norm"])
        q, k = rotate(q), rotate(k)
        v = by_head(h @ b["v_proj"].T, kv_heads)
        mixed = softmax(q @ k.transpose(2, 3) / D**0.5, dim=-1) @ v
        x = x + mixed.transpose(1, 2).reshape(B, S, width) @ b["attn_out"].T
        h = norm(x, b["ff_norm"])
        x = x + (silu(h @ b["ff_proj"].T) * (h @ b["up_proj"].T)) @ b["ff_out"].T
    return norm(x, w["ln_f"]) @ w["wte" if config["weight_tying"] else "ff_out"].T
