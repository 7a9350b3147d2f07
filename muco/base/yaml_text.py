"""YAML of others: no key twice, ``2e-5`` is a number, and what cannot be read is one sentence."""

from __future__ import annotations

import re
from typing import Any

import yaml

from muco.errors import MucoError

MERGE = "tag:yaml.org,2002:merge"  # "<<", which takes in the keys of another group


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but ``2e-5`` is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != MERGE]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: the key {key!r} is there twice")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str, where: str, error: type[MucoError]) -> Any:
    """The value of a YAML text; what cannot be read raises ``error``, which begins with ``where``."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as problem:
        raise error(f"{where}: not YAML: {' '.join(str(problem).split())}") from None
    except RecursionError:
        raise error(f"{where}: lists or groups are nested too deep") from None
    except ValueError as problem:  # a repeated key, or a date that is none
        raise error(f"{where}: {problem}") from None
