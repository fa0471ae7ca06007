"""Initial weights as a function of (seed, name, layer, position): the same under every layout.

Upstream draws them from a generator in the order in which a process builds its modules, so another layout
starts from another model. Here the sharding metadata that checkpoints use says which slice of the whole
matrix this process holds; the whole matrix is drawn on the CPU from its own seed and the slice is copied.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.fp8_utils import is_float8tensor

from xdlm_megatron.model.dlm import DiffusionLM

_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def init_weights(chunk: DiffusionLM, seed: int, vocab_size: int, zero_head: bool) -> None:
    """Fills the parameters of one pipeline chunk.

    Matrices are normal with `init_method_std`, those that write to the residual stream divided by sqrt(2 L)
    (GPT-2); norms are 1; rows of the padded vocabulary are 0; so is the head with `zero_head`.
    """
    config = chunk.config
    state = chunk.sharded_state_dict()
    in_fp8 = _put_plain_copies(state, config.params_dtype)
    apply_factories(state)
    for tensor in nested_values(state):
        if not isinstance(tensor, ShardedTensor):
            continue
        is_head = tensor.key == "output_layer.weight"
        if tensor.key.endswith(("norm.weight", "norm_weight")):
            tensor.data.fill_(1.0)
        elif is_head and zero_head:
            tensor.data.zero_()
        else:
            is_vocabulary = is_head or tensor.key == "embedding.word_embeddings.weight"
            std = config.init_method_std
            if tensor.key.endswith(_RESIDUAL_OUTPUTS):
                std /= math.sqrt(2 * config.num_layers)
            _fill_slice(tensor, seed, std, num_rows=vocab_size if is_vocabulary else None)
    for parameter, values in in_fp8:
        parameter.copy_(values.to(parameter.device))
        # What the optimizer's float32 weights begin with: by itself, what upstream's constructor drew.
        if hasattr(parameter, "get_high_precision_init_val"):
            parameter.get_high_precision_init_val().copy_(values)


def _put_plain_copies(state: dict[str, Any], dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Puts a plain tensor in the place of each FP8 weight, of which a part is no view; returns the pairs."""
    pairs = []
    for entry in nested_values(state):
        if is_float8tensor(getattr(entry, "data", None)):
            pairs.append((entry.data, torch.empty(entry.data.shape, dtype=dtype)))
            entry.data = pairs[-1][1]
    return pairs


def _fill_slice(tensor: ShardedTensor, seed: int, std: float, num_rows: int | None) -> None:
    leading = tensor.prepend_axis_num  # layers are stacked in front of the matrix
    layer = tensor.global_offset[:leading]
    shape, offset = tensor.global_shape[leading:], tensor.global_offset[leading:]
    rows = shape[0] if num_rows is None else num_rows
    digest = hashlib.blake2b(f"{seed}/{tensor.key}/{layer}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    whole = torch.zeros(shape)
    whole[:rows] = torch.randn((rows, *shape[1:]), generator=generator) * std
    window = tuple(slice(start, start + size) for start, size in zip(offset, tensor.data.shape, strict=True))
    tensor.data.copy_(whole[window])
