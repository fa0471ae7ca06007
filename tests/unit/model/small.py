"""Small models for unit tests: a recipe without files, and a world of one process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallel

from xdlm_megatron.config.load import build_config
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.model.build import forget_training
from xdlm_megatron.parallel.mesh import Mesh, open_mesh

RECIPE: dict[str, dict[str, Any]] = {
    "run": {"name": "small", "seed": 3},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    },
    "data": {
        "train_prefix": "none",
        "tokenizer": "none",
        "seq_length": 12,
        "vocab_size": 45,
        "mask_id": 44,
        "make_vocab_size_divisible_by": 16,
    },
    "optimizer": {"lr": 1e-2},
    "lr_schedule": {"kind": "constant"},
    "train": {"num_steps": 10, "micro_batch_size": 2, "global_batch_size": 4},
    "tracking": {"mlflow": None},
}


def small_config(recipe: dict[str, Any] = RECIPE, /, **sections: dict[str, Any]) -> RunConfig:
    """The recipe with some fields changed: `small_config(model={"num_layers": 3})`."""
    tree = copy.deepcopy(recipe)
    for name, fields in sections.items():
        if "kind" in fields:
            tree[name] = fields
        else:
            tree.setdefault(name, {}).update(fields)
    return build_config(tree)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A world of one process, for one test module."""
    with open_mesh() as opened:
        yield opened
    chunks = [thing for thing in gc.get_objects() if isinstance(thing, DistributedDataParallel)]
    forget_training(chunks)  # they would keep the world's threads to the end of the tests
