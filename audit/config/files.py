"""The specification as a file: strict YAML, and ``key=value`` assignments from the command line laid over it."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from audit.config.mistakes import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML in which a key written twice is an error: the plain loader would silently take the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which the library reads, takes 1e-3 for a text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds; an empty file holds an empty one. Raises ConfigError."""
    name = f"configuration: {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist; name a YAML file, such as configs/demo.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read ({error}); name a YAML file in UTF-8") from error
    data = _parsed(text, name)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name} holds a {type(data).__name__}; it takes keys, such as seed: 0")
    return data


def assign(data: Mapping[str, Any], assignment: str, default_lists: Mapping[str, list[Any]]) -> dict[str, Any]:
    """A copy of the data with one ``a.b.0.c=value`` carried out; the value is YAML, a number in the key an index.

    An index equal to the length of a list appends. A list the file does not have starts as ``default_lists`` has it.
    Raises ConfigError for a text that is no assignment, a value that is no YAML, and an index past the end.
    """
    key, sign, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"--set: {assignment!r} is not an assignment; write key=value, such as seed=1")
    value = _parsed(text, f"--set: the value of {assignment!r}")
    result: dict[str, Any] = copy.deepcopy(dict(data))
    here: Any = result
    for depth, part in enumerate(parts):
        name = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(here, list):
            index = _index(part, name, len(here))
            if index == len(here):
                here.append({})
            if last:
                here[index] = value
            elif not isinstance(here[index], (dict, list)):
                here[index] = {}
            here = here[index]
        else:
            if last:
                here[part] = value
            elif not isinstance(here.get(part), (dict, list)):
                # A section in the place of a single value: validation then names the field and what it takes.
                here[part] = copy.deepcopy(default_lists.get(name, {}))
            here = here[part]
    return result


def _index(part: str, name: str, length: int) -> int:
    if part.isdecimal() and int(part) <= length:
        return int(part)
    raise ConfigError(f"--set: {name!r} names no item of the list; it takes 0 to {length}, where {length} appends")


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{where} is not YAML ({mark}{error.problem}); correct it there") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not YAML ({error}); correct it there") from error
