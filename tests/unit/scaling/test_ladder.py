"""The ladder of sizes and the rules of batch and learning rate."""

from __future__ import annotations

import re

import pytest

from xdlm_megatron.config.derive import derive
from xdlm_megatron.config.load import build_config
from xdlm_megatron.scaling.ladder import BATCH_RULES, LADDER, LR_RULES, Scale


@pytest.mark.parametrize("name", LADDER)
def test_a_rung_has_about_as_many_parameters_as_its_name_says(name: str) -> None:
    recipe = {
        "run": {"name": name},
        "model": vars(LADDER[name]),
        "data": {
            "train_prefix": "x",
            "tokenizer": "x",
            "seq_length": 2048,
            "vocab_size": 50258,
            "mask_id": 50257,
        },
        "optimizer": {"lr": 1e-3},
        "lr_schedule": {"kind": "constant"},
        "train": {"num_steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
    }
    said = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    counted = derive(build_config(recipe), 1).num_non_embedding_parameters
    assert counted == pytest.approx(said, rel=0.25)
    shape = LADDER[name]
    assert shape.ffn_hidden_size / shape.hidden_size == pytest.approx(8 / 3, rel=0.06)


def test_published_values_of_the_rules() -> None:
    """What the papers' own formulas and tables give."""
    c = Scale(params=1e9, tokens=1e11, flops=1e20)
    assert LR_RULES["deepseek"](c) == pytest.approx(0.3118 / 10**2.5)
    assert BATCH_RULES["deepseek"](c) == pytest.approx(0.2920 * 10 ** (20 * 0.3271))
    assert LR_RULES["step_law"](c) == pytest.approx(1.79 * 10 ** (-9 * 0.713 + 11 * 0.307))
    assert BATCH_RULES["step_law"](c) == pytest.approx(0.58 * 10 ** (11 * 0.571))
    # GIDD: 1e11 tokens in batches of 1722 sequences of 2048
    assert BATCH_RULES["gidd"](c) / 2048 == pytest.approx(1722, rel=0.01)


def test_every_rule_names_a_paper() -> None:
    for rule in (*LR_RULES.values(), *BATCH_RULES.values()):
        assert re.search(r"arXiv \d{4}\.\d{5}", rule.source)
