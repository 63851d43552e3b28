"""What every part of the specification has in common."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Strict

T = TypeVar("T")
Many = Annotated[tuple[T, ...], Strict(False)]  # YAML has lists, a frozen specification tuples; the items stay strict


class Section(BaseModel):
    """A part of the specification: immutable, no unknown keys, no conversion of types ('3' is not 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
