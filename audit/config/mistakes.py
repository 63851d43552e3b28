"""Mistakes in a specification, told in one sentence: the field, its value and what would be right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_SHOWN = 60  # characters of a wrong value that a sentence repeats


class ConfigError(ValueError):
    """A mistake its author can correct. The message is one line: line breaks of quoted texts become spaces."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the specification an error lies."""

    path: tuple[str | int, ...]
    section: type[BaseModel] | None  # whose keys the last part of the path is one of
    field: FieldInfo | None
    model: type[BaseModel] | None  # the section that the field itself holds, if it holds one kind only


def mistake(error: ValidationError, root: type[BaseModel], data: Mapping[str, Any]) -> ConfigError:
    """The first mistake of a failed validation of ``data`` as ``root``; an unknown key, often a typo, before others.

    Validators over several fields raise ValueError("field: value ...; what would be right"), the field relative to
    the section they belong to. Everything else is told from the field's description, which says what it takes.
    """
    details = sorted(error.errors(), key=lambda d: d["type"] not in ("extra_forbidden", "invalid_key"))[0]
    place = _locate(root, details["loc"])
    name = ".".join(map(str, place.path))
    match details["type"]:
        case "value_error":
            return ConfigError(f"{name}.{details['ctx']['error']}" if name else str(details["ctx"]["error"]))
        case "invalid_key":
            return ConfigError(
                f"{'.'.join(map(str, details['loc']))}: this key is not a text; keys are names, such as seed"
            )
        case "extra_forbidden":
            return ConfigError(_unknown_key(name, place, root, details["input"]))
        case "union_tag_invalid" | "union_tag_not_found":
            kind = details["input"].get("kind") if isinstance(details["input"], Mapping) else None
            kinds = list(_models(place.field.annotation)) if place.field else []
            return ConfigError(f"{name}.kind: {_told(kind)}; it takes {_one_of(kinds)}{_hint(kind, kinds)}")
        case "missing":
            return ConfigError(f"{name}: missing; it takes {_expected(place.field)}")
        case "model_type" | "model_attributes_type" if place.model is not None:
            keys = ", ".join(_keys(place.model))
            return ConfigError(f"{name}: {_told(_at(data, place.path))}; it takes a section with the keys {keys}")
    # The description is that of the whole field, so an item of a list is told as the list.
    path = place.path[:-1] if isinstance(place.path[-1], int) else place.path
    hint = _hint(_at(data, place.path), list(_choices(place.field.annotation if place.field else None)))
    told = _told(_at(data, path))
    return ConfigError(f"{'.'.join(map(str, path))}: {told}; it takes {_expected(place.field)}{hint}")


def shown(value: object) -> str:
    """A value as a sentence repeats it: its repr, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _told(value: object) -> str:
    return "no value is given, or null" if value is None else f"{shown(value)} cannot be used"


def _hint(value: object, known: Sequence[str]) -> str:
    near = get_close_matches(value.lower(), known, n=1) if isinstance(value, str) else []
    return f" (did you mean {near[0]}?)" if near else ""


def _unknown_key(name: str, place: _Place, root: type[BaseModel], value: object) -> str:
    assert place.section is not None
    key, known = str(place.path[-1]), list(_keys(place.section))
    elsewhere = [full for full in _all_keys(root) if full.rsplit(".", 1)[-1] == key]
    hint = _hint(key, known) or (f" (did you mean {elsewhere[0]}?)" if elsewhere else "")
    return f"{name}: unknown key with the value {shown(value)}; known keys are {', '.join(known)}{hint}"


def _locate(root: type[BaseModel], loc: Sequence[str | int]) -> _Place:
    """Follow pydantic's location; parts that name a member of a union are no keys of the file and are left out."""
    path: list[str | int] = []
    section: type[BaseModel] | None = None
    field: FieldInfo | None = None
    models: dict[str, type[BaseModel]] = {"": root}
    for depth, part in enumerate(loc):
        if isinstance(part, int):
            path.append(part)
        elif len(models) > 1 and part in models:
            models = {"": models[part]}
        elif "" in models:
            section, path = models[""], [*path, part]
            field = next((f for n, f in section.model_fields.items() if part == (f.alias or n)), None)
            if field is None:
                assert depth == len(loc) - 1
                return _Place(tuple(path), section, None, None)
            models = _models(field.annotation)
        else:
            break
    return _Place(tuple(path), section, field, models.get(""))


def _models(annotation: Any) -> dict[str, type[BaseModel]]:
    """The sections an annotation holds: one under the empty name, or several under their ``kind``."""
    found = list(_leaves(annotation))
    if len(found) == 1:
        return {"": found[0]}
    return {get_args(model.model_fields["kind"].annotation)[0]: model for model in found}


def _leaves(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _leaves(argument)


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) not in (dict, tuple):
        for argument in get_args(annotation):
            yield from _choices(argument)


def _expected(field: FieldInfo | None) -> str:
    assert field is not None
    return field.description or _one_of(list(_choices(field.annotation)))


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]


def _keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield field.alias or name


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _at(data: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, Sequence) and isinstance(part, int) and part < len(data):
            data = data[part]
    return data
