"""What checks of cluster files have in common: how a mistake is told, and the version that everything must have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from audit.config.mistakes import shown

_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(slots=True)
class Findings:
    """What a check found in one file. ``mistakes`` must be corrected, ``remarks`` are for somebody to decide."""

    what: str  # the file starts, in a few words
    mistakes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def wrong(self, name: str, value: object, right: str) -> None:
        """Field ``name`` holds ``value`` (None: nothing); ``right`` says what it takes."""
        told = "no value is given" if value is None else f"{shown(value)} cannot be used"
        self.mistakes.append(f"{name}: {told}; {right}")

    def remark(self, name: str, text: str) -> None:
        self.remarks.append(f"{name}: {text}")

    def require(self, correct: bool, name: str, value: object, right: str) -> None:
        if not correct:
            self.wrong(name, value, right)

    def require_image(self, name: str, image: object) -> None:
        """An image's tag says the installed Ray, as one of its parts."""
        tag = str(image).rpartition(":")[2] if ":" in str(image) else ""
        right = f"it takes an image whose tag names the installed Ray, such as rayproject/ray:{ray.__version__}-py311"
        self.require(_VERSION.findall(tag)[-1:] == [ray.__version__], name, image, right)


def pinned_ray(lines: Sequence[str]) -> str | None:
    """The version that requirement lines pin Ray to, None where they do not."""
    for line in lines:
        if found := re.fullmatch(r"ray(\[[\w,]*\])?==(\S+)", line.partition("#")[0].strip()):
            return found.group(2)
    return None


def as_mapping(value: Any) -> dict[str, Any]:
    """The mapping a free-form part of a file holds, an empty one where it holds something else."""
    return value if isinstance(value, dict) else {}
