"""Rules that every knob keeps: documented, strict, frozen, and equal after a round trip."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from xdlm_megatron.config import samplers, schema
from xdlm_megatron.config.derive import derive, model_parallel_size, num_parameters, padded_vocab_size
from xdlm_megatron.config.load import ConfigError, build_config, dump_recipe, load_recipe
from xdlm_megatron.config.schema import RunConfig

# Knobs that only another one allows.
NEEDS = {
    "virtual_pipeline_model_parallel_size": {"pipeline_model_parallel_size": 2},
    "fp8": {"dtype": "bfloat16"},
    "fp8_recipe": {"dtype": "bfloat16", "fp8": "e4m3"},
    "fp8_param_gather": {"dtype": "bfloat16", "fp8": "e4m3"},
    "num_layers_at_start_in_bf16": {"dtype": "bfloat16", "fp8": "e4m3"},
    "num_layers_at_end_in_bf16": {"dtype": "bfloat16", "fp8": "e4m3"},
    "overlap_param_gather": {"overlap_grad_reduce": True},
    "optimizer_offload_fraction": {"optimizer_cpu_offload": True},
}
BF16 = {"precision": {"dtype": "bfloat16"}}
NEEDS_SECTIONS = {
    "optimizer_cpu_offload": BF16,
    "optimizer_offload_fraction": BF16,
    "autoregressive": {"diffusion": {"uniform_ratio": 0.0}, "sampling": {"kind": "left_to_right"}},
}
MODULES = (schema, samplers)
Change = Callable[[dict[str, Any]], dict[str, Any]]
FILES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
EXAMPLES = [path for path in FILES if "\nsweep:" not in path.read_text()]
UNIONS = {
    "lr_schedule": [
        {"kind": "constant"},
        {"kind": "cosine"},
        {"kind": "wsd", "decay_steps": 5},
    ],
    "sampling": [
        {"kind": "ancestral"},
        {"kind": "confidence"},
        {"kind": "refine"},
        {"kind": "remdm"},
        {"kind": "remdm_loop"},
        {"kind": "saber"},
        {"kind": "left_to_right"},
    ],
}


def sections() -> list[Any]:
    """Every section's class, the members of unions too."""
    return [
        c
        for module in MODULES
        for _, c in inspect.getmembers(module, inspect.isclass)
        if dataclasses.is_dataclass(c) and c.__module__ == module.__name__ and c is not RunConfig
    ]


def sources() -> Iterator[tuple[type, ast.ClassDef]]:
    """Every section's class and its source."""
    for section in sections():
        (node,) = ast.parse(inspect.getsource(section)).body
        assert isinstance(node, ast.ClassDef)
        yield section, node


def without_metadata(hint: Any) -> Any:
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def alternatives(hint: Any) -> list[Any]:
    """The plain types of a knob: int, float, bool, str, NoneType, Literal[...], dict."""
    hint = without_metadata(hint)
    return [t for part in typing.get_args(hint) for t in alternatives(part)] if is_union(hint) else [hint]


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, type(int | None))


def knobs() -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """(section, its required `kind` if it is a union, field, type) of every knob."""
    for section, hint in typing.get_type_hints(RunConfig, include_extras=True).items():
        members = [t for t in alternatives(hint) if dataclasses.is_dataclass(t)]
        for index, member in enumerate(members):
            base = UNIONS[section][index] if len(members) > 1 else {}
            for name, field_hint in typing.get_type_hints(member, include_extras=True).items():
                yield section, base, name, field_hint


KNOBS = [pytest.param(*k, id=".".join([k[0], *list(k[1].values())[:1], k[2]])) for k in knobs()]


def test_every_knob_has_a_line_that_says_what_it_is() -> None:
    undocumented, count = [], 0
    for _, node in sources():
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                count += 1
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if not (
                    is_text and isinstance(following.value.value, str) and following.value.value.endswith(".")
                ):
                    undocumented.append(f"{node.name}.{statement.target.id}")
    assert undocumented == []
    assert count == sum(len(inspect.get_annotations(s)) for s in sections()) > 50


def test_every_choice_is_named_in_its_line() -> None:
    for section, node in sources():
        hints = typing.get_type_hints(section)
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and statement.target.id != "kind":
                hint = hints[statement.target.id]
                choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
                missing = [choice for choice in choices if choice not in following.value.value]
                assert missing == [], f"{node.name}.{statement.target.id}"


def test_every_choice_is_built_by_what_reads_it() -> None:
    from xdlm_megatron.diffusion.schedule import SCHEDULES
    from xdlm_megatron.samplers import SAMPLERS

    assert set(typing.get_args(typing.get_type_hints(schema.Diffusion)["schedule"])) == set(SCHEDULES)
    assert [kind["kind"] for kind in UNIONS["sampling"]] == list(SAMPLERS)


@pytest.mark.parametrize(("section", "base", "name", "hint"), KNOBS)
def test_a_knob_takes_its_own_type_alone(
    recipe: dict[str, Any], changed: Change, section: str, base: dict[str, Any], name: str, hint: Any
) -> None:
    start = base or recipe.get(section, {})
    types = alternatives(hint)
    wrong = [value for kind, value in ((int, "1"), (float, "0.25"), (bool, "true")) if kind in types]
    if int in types or float in types:
        wrong.append(True)
    if int in types:
        wrong += [1.0, 1.5]
    if bool in types:
        wrong += [0, 1.0]
    if str in types or typing.get_origin(types[0]) is Literal:
        wrong += [1, 0.5, True]
    if type(None) not in types:
        wrong.append(None)
    wrong.append([])
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"(?m)^  {section}(\.kind|\.{name}(\.\d)?)?: "):
            build_config(changed({section: {**start, name: value}}))


@pytest.mark.parametrize(("section", "base", "name", "hint"), KNOBS)
def test_another_value_survives_dump_and_load(
    tmp_path: Path,
    recipe: dict[str, Any],
    changed: Change,
    section: str,
    base: dict[str, Any],
    name: str,
    hint: Any,
) -> None:
    start = (base or recipe.get(section, {})) | NEEDS.get(name, {})
    path = tmp_path / "recipe.yaml"
    for value in other_values(hint):
        tree = changed({section: {**start, name: value}, **NEEDS_SECTIONS.get(name, {})})
        try:
            config = build_config(tree)
        except ConfigError:
            continue  # a range or another knob forbids this one
        assert getattr(getattr(config, section), name) == value
        path.write_text(dump_recipe(config))
        assert load_recipe(path) == config
        break
    else:
        assert name == "kind", f"no value of {section}.{name} was valid"


def other_values(hint: Any) -> list[Any]:
    values: list[Any] = []
    for kind in alternatives(hint):
        match kind:
            case _ if typing.get_origin(kind) is Literal:
                values += reversed(typing.get_args(kind))
            case _ if kind is bool:
                values += [True, False]
            case _ if kind is int:
                values += [8, 12, 2, 1, 64, 5000]
            case _ if kind is float:
                values += [0.3, 0.0001, 3]
            case _ if typing.get_origin(kind) is tuple:
                values.append((4, 2, 100))
            case _ if kind is str:
                values += ["12e3", "http://host"]
            case _:
                values += [
                    {"recompute_granularity": "full", "recompute_num_layers": 1, "x": [1.5, None, "2e3"]}
                ]
    return values


def test_a_recipe_is_frozen(recipe: dict[str, Any]) -> None:
    config = build_config(recipe)
    for section in [config, *(getattr(config, f.name) for f in dataclasses.fields(config))]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, dataclasses.fields(section)[0].name, None)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    config = load_recipe(path)
    assert derive(config, model_parallel_size(config)).num_microbatches >= 1


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_llada_has_the_published_number_of_parameters() -> None:
    """Half the total_size, in bfloat16, of the index of GSAI-ML/LLaDA-8B-Base's weights."""
    config = load_recipe(next(path for path in EXAMPLES if path.stem == "llada_8b_cpt"))
    assert num_parameters(config) == 16_031_162_368 // 2
    assert padded_vocab_size(config) == config.data.vocab_size
