"""Every contradiction is found, names its knobs with their values, and says what to do."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from tests.unit.config.contradictions import CONTRADICTIONS, ODD_SLICES
from xdlm_megatron.config import gpu_rules, rules
from xdlm_megatron.config.load import ConfigError, build_config

Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(("changes", "names", "cure"), CONTRADICTIONS)
def test_contradiction(
    changed: Change, changes: dict[str, Any], names: list[str], cure: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(changed(changes))
    head, *lines = str(caught.value).split("\n")
    assert head == "recipe: 1 bad field"
    assert len(lines) == 1
    for name in names:
        assert name in lines[0]
    assert ";" in lines[0]  # what to do follows
    build_config(changed(cure))


def test_every_rule_has_a_case(recipe: dict[str, Any], change_tree: Any) -> None:
    """Each `yield` of the rules, by its lines, is reached by some case."""
    modules = {module.__file__: module for module in (rules, gpu_rules)}
    yields = {
        (file, node.lineno): {(file, line) for line in range(node.lineno, node.end_lineno + 1)}
        for file, module in modules.items()
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Yield)
    }
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename in modules:
            reached.add((frame.f_code.co_filename, frame.f_lineno))
            return trace
        return None

    before = sys.gettrace()
    for case in CONTRADICTIONS:
        tree = change_tree(copy.deepcopy(recipe), case.values[0])
        sys.settrace(trace)
        try:
            with contextlib.suppress(ConfigError):
                build_config(tree)
        finally:
            sys.settrace(before)
    assert [line for line, lines in yields.items() if reached.isdisjoint(lines)] == []
    assert len(yields) > 30


def test_the_small_recipe_has_no_contradiction(recipe: dict[str, Any]) -> None:
    assert rules.find_contradictions(build_config(recipe)) == []


@pytest.mark.parametrize("torchs_attention", [{"precision.dtype": "float32"}, {"data.packing": "documents"}])
def test_torchs_attention_takes_odd_slices(changed: Change, torchs_attention: dict[str, Any]) -> None:
    build_config(changed(ODD_SLICES | torchs_attention))


def test_several_contradictions_come_together(changed: Change) -> None:
    with pytest.raises(ConfigError, match="recipe: 3 bad fields"):
        build_config(changed({"data.mask_id": 100, "lr_schedule.min_lr": 1.0, "train.micro_batch_size": 3}))


def test_fields_kept_from_megatron_are_its_fields() -> None:
    """A field that upstream renames would open a back door."""
    importlib.import_module("xdlm_megatron.parallel")  # first: it patches what the next line imports
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    assert rules.OWNED_MCORE_FIELDS.keys() <= known
    assert rules.FIXED_MCORE_FIELDS.keys() <= known
    assert not rules.OWNED_MCORE_FIELDS.keys() & rules.FIXED_MCORE_FIELDS.keys()
