"""Where two runs differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def difference(old: Any, new: Any, field_name: str = "") -> tuple[str, Any, Any] | None:
    """The first field, by dotted name, in which two nested mappings differ: (field, old, new); None if they agree."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            found = difference(old.get(key), new.get(key), f"{field_name}.{key}" if field_name else str(key))
            if found:
                return found
        return None
    return None if old == new else (field_name, old, new)
