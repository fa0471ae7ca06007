"""A YAML recipe and dotted overrides -> RunConfig. Every mistake is reported at once, with its cure."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from xdlm_megatron.config.rules import find_contradictions
from xdlm_megatron.config.schema import RunConfig

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe that cannot be used; the message names each field, the rule and the cure."""


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's floats (PyYAML reads 3e-4 as a string) and no silent duplicate keys."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would read as floats, such as a run called 12e3."""


_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _checked_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        where = f"line {key.start_mark.line + 1}"
        if key.tag != yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
            shown = f"'{key.value}'" if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise yaml.YAMLError(f"{shown} cannot be a key ({where}); keys are names of sections and fields")
        if key.value in seen:
            raise yaml.YAMLError(f"'{key.value}' is given twice ({where}); keep one")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _checked_mapping)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe.

    Args:
        path: the YAML file.
        overrides: `section.field=value` or `section={...}` strings; the value is read as YAML.

    Raises:
        ConfigError: the file is missing or not YAML, or any field is unknown, missing, mistyped or in
            contradiction with another one.
    """
    return build_config(read_tree(path, overrides), source=Path(path).name)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file with dotted overrides. Raises ConfigError as `load_recipe` does."""
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return tree


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The recipe with dotted overrides. Raises ConfigError as `load_recipe` does."""
    tree = to_tree(config)
    for override in overrides:
        _apply_override(tree, override)
    return build_config(tree, source=config.run.name)


def build_config(tree: dict[str, Any], source: str = "recipe") -> RunConfig:
    """Validates a tree of plain values. Raises ConfigError as `load_recipe` does."""
    config = validate(RunConfig, tree, source)
    contradictions = find_contradictions(config)
    if contradictions:
        raise ConfigError(_report(source, contradictions))
    return config


def validate(root: type[T], tree: Any, source: str) -> T:
    """The tree as a `root`, a dataclass of sections. Raises ConfigError with a line for every bad field."""
    try:
        return TypeAdapter(root).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_report(source, [_explain(e, root) for e in error.errors()])) from None


def to_tree(config: Any) -> dict[str, Any]:
    """The recipe as plain values, every default written out."""
    return dataclasses.asdict(config)


def dump_recipe(config: RunConfig) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal RunConfig."""
    return yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the recipe ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that no calendar has
        raise ConfigError(f"{path}: not a recipe in YAML: {_one_line(error)}; mend it there") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (got {tree!r:.60}); see examples/")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ConfigError(
            f"override '{override}': write it as section.field=value, for example train.num_steps=100"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override '{override}': '{text}' is not YAML: {_one_line(error)}") from None
    set_field(tree, dotted, value, f"override '{override}'")


def set_field(tree: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Sets `section.field` in a tree of plain values. Raises ConfigError for a field of a value."""
    node = tree
    *sections, last = dotted.split(".")
    for key in sections:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"{source}: '{key}' is a value, not a section; remove what follows it")
    node[last] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _report(source: str, problems: Sequence[str]) -> str:
    noun = "field" if len(problems) == 1 else "fields"
    return "\n".join([f"{source}: {len(problems)} bad {noun}", *(f"  {p}" for p in problems)])


def _explain(error: Any, root: Any) -> str:
    """One line on one of pydantic's errors, without its jargon."""
    location = [str(part) for part in error["loc"]]
    sections = _sections_at(location, root)
    if len(location) > 1 and location[1] in _kinds(location[0], root):
        del location[1]  # pydantic names the branch of a union; the recipe does not
    name = ".".join(location)
    match error["type"]:
        case "unexpected_keyword_argument":
            known = [f.name for s in sections for f in dataclasses.fields(s)]
            close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.65)
            cure = f"did you mean '{close[0]}'?" if close else f"remove it (there are {', '.join(known)})"
            return f"{name}: no such field; {cure}"
        case "missing" | "missing_argument":
            return f"{name}: required, and has no default; add it"
        case "dataclass_type" | "model_attributes_type":
            return f"{name}: must be a section of fields (got {error['input']!r})"
        case "union_tag_not_found":
            return f"{name}.kind: required; choose {_either(_kinds(name, root))}"
        case "union_tag_invalid":
            return (
                f"{name}.kind: Input should be {_either(_kinds(name, root))} (got {error['input']['kind']!r})"
            )
        case _:
            return f"{name}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"


def _sections_at(location: Sequence[str], root: Any) -> list[Any]:
    """The section that holds the field at `location`, pydantic's names of union branches included."""
    sections: list[Any] = [root]
    for key in location[:-1]:
        hints = [typing.get_type_hints(s).get(key) for s in sections]
        inner = [member for hint in hints for member in _dataclasses_in(hint)]
        sections = inner or [s for s in sections if _kind_of(s) == key] or sections
    return sections


def _kinds(name: str, root: Any) -> list[str]:
    """The kinds of the union section `name`; none where it is no union."""
    hint = typing.get_type_hints(root).get(name)
    return [kind for member in _dataclasses_in(hint) if (kind := _kind_of(member)) is not None]


def _kind_of(section: Any) -> str | None:
    options = typing.get_args(typing.get_type_hints(section).get("kind"))
    return options[0] if options else None


def _dataclasses_in(hint: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(hint):
        yield hint
    elif isinstance(hint, types.UnionType) or typing.get_origin(hint) is not None:
        for argument in typing.get_args(hint):
            yield from _dataclasses_in(argument)


def _either(words: Sequence[str]) -> str:
    quoted = [f"'{word}'" for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]])
