"""A small valid recipe as a tree, and ways to change it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

RECIPE: dict[str, Any] = {
    "run": {"name": "small"},
    "model": {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4},
    "data": {
        "train_prefix": "data/text",
        "tokenizer": "data/tokenizer.model",
        "seq_length": 16,
        "vocab_size": 100,
        "mask_id": 2,
    },
    "optimizer": {"lr": 1e-3},
    "lr_schedule": {"kind": "cosine"},
    "train": {"num_steps": 20, "micro_batch_size": 2, "global_batch_size": 8},
}


@pytest.fixture
def recipe() -> dict[str, Any]:
    return copy.deepcopy(RECIPE)


def change(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with `section.field` values replaced; a plain `section` replaces a whole section."""
    for name, value in changes.items():
        section, _, field = name.partition(".")
        if field:
            tree.setdefault(section, {})[field] = value
        else:
            tree[section] = value
    return tree


@pytest.fixture
def change_tree() -> Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]:
    return change


@pytest.fixture
def changed(recipe: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The small recipe, changed; a second call changes it further."""
    return lambda changes: change(recipe, changes)
