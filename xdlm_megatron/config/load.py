"""A YAML recipe and dotted overrides -> RunConfig. Every mistake is reported at once, with its cure."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from xdlm_megatron.config.rules import find_contradictions
from xdlm_megatron.config.schema import RunConfig


class ConfigError(ValueError):
    """A recipe that cannot be used; the message names each field, the rule and the cure."""


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's floats (PyYAML reads 3e-4 as a string) and no silent duplicate keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.YAMLError(f"'{key}' is given twice (line {key_node.start_mark.line + 1}); keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe.

    Args:
        path: the YAML file.
        overrides: `section.field=value` strings; the value is read as YAML.

    Raises:
        ConfigError: the file is missing or not YAML, or any field is unknown, missing, mistyped or in
            contradiction with another one.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return build_config(tree, source=Path(path).name)


def build_config(tree: dict[str, Any], source: str = "recipe") -> RunConfig:
    """Validates a tree of plain values. Raises ConfigError as `load_recipe` does."""
    try:
        config = TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_report(source, [_explain(e) for e in error.errors()])) from None
    contradictions = find_contradictions(config)
    if contradictions:
        raise ConfigError(_report(source, contradictions))
    return config


def to_tree(config: Any) -> dict[str, Any]:
    """The recipe as plain values, every default written out."""
    return dataclasses.asdict(config)


def dump_recipe(config: RunConfig) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal RunConfig."""
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the recipe ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}; see examples/"
        )
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys) or len(keys) < 2:
        raise ConfigError(
            f"override '{override}': write it as section.field=value, for example train.num_steps=100"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override '{override}': '{text}' is not YAML: {' '.join(str(error).split())}"
        ) from None
    node = tree
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(
                f"override '{override}': '{key}' is a value, not a section; remove what follows it"
            )
    node[keys[-1]] = value


def _report(source: str, problems: Sequence[str]) -> str:
    noun = "field" if len(problems) == 1 else "fields"
    return "\n".join([f"{source}: {len(problems)} bad {noun}", *(f"  {p}" for p in problems)])


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    if location and location[0] == "lr_schedule" and len(location) > 1:
        del location[1]  # pydantic names the union's branch; the recipe does not
    name = ".".join(location) or "recipe"
    match error["type"]:
        case "unexpected_keyword_argument":
            close = difflib.get_close_matches(location[-1], list(_field_names(location[:-1], error)), n=1)
            hint = (
                f"; did you mean '{close[0]}'?" if close else "; remove it, or see show-config for the fields"
            )
            return f"{name}: no such field{hint}"
        case "missing" | "missing_argument":
            return f"{name}: required, and has no default; add it"
        case "dataclass_type":
            return f"{name}: must be a section of fields (got {error['input']!r})"
        case _:
            return f"{name}: {error['msg']} (got {error['input']!r})"


def _field_names(location: Sequence[str], error: Any) -> Iterator[str]:
    """Field names of the section at `location`; of a union, of all its members."""
    sections: list[Any] = [RunConfig]
    for key in location:
        hints = [typing.get_type_hints(s).get(key) for s in sections]
        sections = [member for hint in hints for member in _dataclasses_in(hint)]
    for s in sections:
        yield from (f.name for f in dataclasses.fields(s))


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(hint):
        yield hint
    elif isinstance(hint, types.UnionType) or typing.get_origin(hint) is not None:
        for argument in typing.get_args(hint):
            yield from _dataclasses_in(argument)
