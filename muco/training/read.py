"""Strict reading: YAML without repeated keys, ``key=value`` words, and frozen dataclasses from plain values.

Unknown keys, wrong types and missing values are a :class:`~muco.errors.RecipeError` that names the dotted key.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import yaml

from muco.errors import RecipeError, did_you_mean


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but ``2e-5`` is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"line {node.start_mark.line + 1}: the key {key!r} is there twice")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; ``where`` begins the error."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def set_value(values: dict[str, Any], word: str, flag: str = "--set") -> None:
    """Sets one value in nested dicts; ``word`` is "dotted.key=value", the value in YAML."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        example = "loss.temperature=0.05" if flag == "--set" else "images=photos"
        raise RecipeError(f"{flag} {word!r}: write it as key=value, e.g. {flag} {example}")
    *parents, last = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{flag} {word!r}: {parent!r} is not a group of keys")
    values[last] = parse_yaml(text, f"{flag} {word}")


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """The options of a data format as a mapping, from "key=value" words with the values in YAML."""
    values: dict[str, Any] = {}
    for word in words:
        set_value(values, word, flag="--option")
    return values


def check_keys(given: Iterable[Any], accepted: Collection[str], where: str) -> None:
    """Refuses a key that is not accepted, and names the nearest one that is."""
    for key in given:
        if key not in accepted:
            raise RecipeError(f"unknown key {_dotted(where, key)!r}{did_you_mean(key, accepted)}")


def build(kind: type, values: Any, where: str = "") -> Any:
    """A dataclass from plain values; ``where`` is the dotted key of the group, "" for the whole recipe."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'recipe'} must be a group of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    check_keys(values, hints, where)
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            raise RecipeError(f"{_dotted(where, item.name)!r} is missing")
    return kind(**{key: _convert(hints[key], value, _dotted(where, key)) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise RecipeError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = dict if origin is not None else hint
    if not isinstance(value, plain) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{where} must be {plain.__name__}, got {value!r}")
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [argument for argument in arguments if argument is not type(None)]
    problems = []
    for choice in choices:
        try:
            return _convert(choice, value, where)
        except RecipeError as error:
            problems.append(str(error))
    raise RecipeError(problems[0] if len(problems) == 1 else f"{problems[0]}; or: {problems[1]}")


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
