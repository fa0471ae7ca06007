"""One process that plays any rank of any world: real models and groups, collectives that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit.model.small import small_config
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.model.build import build_model
from xdlm_megatron.parallel.mesh import Mesh, open_mesh_for

# Sizes that no two products of which are the same.
MODEL = {
    "hidden_size": 40,
    "ffn_hidden_size": 56,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}


@contextmanager
def rank_of(config: RunConfig, rank: int, world: int) -> Iterator[Mesh]:
    """The mesh as process `rank` of `world` sees it."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with open_mesh_for(config.parallel) as mesh:
            yield mesh
    finally:
        dist.destroy_process_group()


def recipe(num_layers: int, dtype: str, **sections: dict[str, Any]) -> RunConfig:
    """A small recipe of MODEL's sizes, 16 tokens a sequence and two sequences a micro-batch."""
    sections["model"] = MODEL | {"num_layers": num_layers} | sections.get("model", {})
    sections["data"] = {"seq_length": 16} | sections.get("data", {})
    sections["train"] = {"micro_batch_size": 2, "global_batch_size": 8} | sections.get("train", {})
    return small_config(precision={"dtype": dtype}, **sections)


def run_forward(config: RunConfig, mesh: Mesh, without_head: bool = True) -> tuple[Any, Tensor]:
    """The model of one stage, and what it gives for random tokens."""
    (chunk,) = build_model(config, mesh)
    chunk.train()
    B, T = config.train.micro_batch_size, config.data.seq_length
    zt_BS = torch.randint(0, 44, (B, T // config.parallel.context_parallel_size))
    document_BT = None if config.data.packing == "stream" else torch.zeros(B, T, dtype=torch.long)
    return chunk, chunk(zt_BS, document_BT, without_head)


def saved_bytes(forward: Callable[[], Any], parameters: Callable[[], set[int]]) -> int:
    """Bytes of the storages that a forward pass keeps for its backward pass, parameters not counted."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    skipped = parameters()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in skipped)
