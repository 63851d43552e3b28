"""The files behind a source's path: one file, a folder or a pattern, on the local disk or at any fsspec URL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from audit.config import ConfigError

_PATTERN = "*?["


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file with the name its documents carry, which does not depend on where the configuration lies."""

    system: Any  # fsspec file system
    path: str
    name: str

    def open(self, mode: str, **options: Any) -> Any:
        """The file's stream; ``.gz`` and its kind are unpacked where text is read."""
        return self.system.open(self.path, mode, **options)


@dataclass(frozen=True, slots=True)
class Found:
    """The files of one source in the order of their paths, and how many of a folder's were left out."""

    files: list[SourceFile]
    hidden: int  # names starting with a dot
    other: int  # of another kind than the source reads


def find_files(path: str, folder: Path, field: str, suffixes: Sequence[str] | None = None) -> Found:
    """The files at a path, relative to the folder; below a folder only those whose name has one of the suffixes.

    Raises ConfigError, naming the field, if there are none.
    """
    url = path if "://" in path else str(folder.absolute() / Path(path).expanduser())
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{field}: {path!r} cannot be reached ({error}); name a local path or another URL") from error
    if system.isfile(root):
        return Found([SourceFile(system, root, PurePosixPath(root).name)], 0, 0)
    if system.isdir(root):
        base, candidates, kind = str(PurePosixPath(root).parent), system.find(root), f"folder {url!r} holds no file"
    elif is_pattern(path):
        base = fixed_part(root)
        candidates, kind = [f for f in system.glob(root) if system.isfile(f)], f"pattern {url!r} matches no file"
        suffixes = None
    else:
        raise ConfigError(f"{field}: {path!r} does not exist (looked for {url!r}); name a file, a folder or a pattern")
    names = {file: str(PurePosixPath(file).relative_to(base)) for file in sorted(candidates)}
    visible = {f: n for f, n in names.items() if not any(part.startswith(".") for part in PurePosixPath(n).parts[1:])}
    wanted = {f: n for f, n in visible.items() if suffixes is None or n.lower().endswith(tuple(suffixes))}
    if not wanted:
        ending = f" named {' or '.join(suffixes)}" if suffixes else ""
        raise ConfigError(f"{field}: {path!r} gives no text: the {kind}{ending}; name a file, a folder or a pattern")
    files = [SourceFile(system, file, name) for file, name in wanted.items()]
    return Found(files, len(names) - len(visible), len(visible) - len(wanted))


def is_pattern(path: str) -> bool:
    """Whether a path that does not exist is meant as a pattern."""
    return any(sign in path for sign in _PATTERN)


def fixed_part(pattern: str) -> str:
    """The folder that everything a pattern matches lies in."""
    return str(PurePosixPath(pattern[: min(pattern.find(sign) for sign in _PATTERN if sign in pattern)] + "x").parent)
