"""YAML files, read as YAML 1.2: the one reader and writer of recipes and of the settings of a search.

PyYAML reads YAML 1.1, in which `1:30` is 90, `010` is 8, `no` is false, `1e3` is a string, and the last of two equal
keys wins. Here plain values follow the core schema of YAML 1.2, and a key that is given twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import HfkdError

# Plain values of the core schema: a tag, the pattern of its values, and the characters that they begin with.
CORE_SCHEMA = (
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Loader of the core schema, without repeated keys and without values that contain themselves."""

    yaml_implicit_resolvers: dict[str, list] = {}

    def __init__(self, stream: str):
        super().__init__(stream)
        self.deep_construct = True  # else PyYAML would build a value that contains itself

    def construct_mapping(self, node, deep=False):
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in lines:
                    first = lines[key.tag, key.value]
                    where = f"line {line}" if first == line else f"lines {first} and {line}"
                    raise HfkdError(f"the key '{key.value}' is given twice, in {where}: remove one.")
                lines[key.tag, key.value] = line
        return super().construct_mapping(node, deep)

    def construct_integer(self, node):
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes each string that YAML 1.1 or the core schema would read as another value."""


for _tag, _pattern, _first in CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text.

    Args:
        source: file or key that the text comes from, for the message.

    Raises:
        HfkdError: if the text is not valid YAML, or has a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise HfkdError(f"{source} is not valid YAML: {problem}{where}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise HfkdError(f"{source} is not valid YAML: {error}") from error


def read_yaml(path: Path) -> Any:
    """Return the value in a YAML file.

    Raises:
        HfkdError: if the file cannot be read, is not valid YAML, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HfkdError(f"{path} cannot be read: {error}. Expected a YAML file in UTF-8.") from error
    return parse_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """Return a value as YAML, with mappings in their order; `parse_yaml` gives it back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
