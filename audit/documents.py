"""A document: the unit of text that is read, split, resampled and never crossed by a sequence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a stable name and the domain (``code``, ``prose``, ...) that studies compare."""

    name: str
    domain: str
    text: str
