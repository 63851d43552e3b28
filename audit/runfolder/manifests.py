"""Manifests: one JSON file per commit, written last; the only truth about what is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from audit.runfolder.errors import RunFolderError
from audit.storage import Storage

FOLDER = "manifests"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One commit: the tasks it completes and the files that hold their rows (paths relative to the run folder).

    ``tasks`` maps a task's id to its receipt: rows written per table and how it was run.
    """

    commit: str
    run: str  # digest of the run the commit belongs to
    tasks: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Sequence[str]] = field(default_factory=dict)


class Manifests:
    """The manifests of a run folder. One is read once, together with the others that are new: it never changes."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._read: dict[str, Manifest] = {}

    def all(self) -> list[Manifest]:
        """Every commit, in the order of their names; raises RunFolderError where two name the same task."""
        names = [name for name in self._storage.list(FOLDER) if name.endswith(".json")]
        new = [name for name in names if name not in self._read]
        for name, content in zip(new, self._storage.read_many(new), strict=True):
            self._read[name] = self._parsed(name, content)
        if len(self._read) > len(names):
            self._read = {name: self._read[name] for name in names}
        if new:
            self._refuse_twice()
        return [self._read[name] for name in names]

    def write(self, manifest: Manifest) -> None:
        """From here on its tasks are done."""
        text = json.dumps(asdict(manifest), sort_keys=True) + "\n"
        self._storage.write(f"{FOLDER}/{manifest.commit}.json", text.encode())

    def _parsed(self, name: str, content: bytes) -> Manifest:
        try:
            return Manifest(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise RunFolderError(
                f"{self._storage.url}: {name} is damaged ({error}); delete it, and its tasks are run again"
            ) from error

    def _refuse_twice(self) -> None:
        seen: dict[str, str] = {}
        for manifest in self._read.values():
            for task in manifest.tasks:
                if task in seen:
                    both = " and ".join(sorted([seen[task], manifest.commit]))
                    raise RunFolderError(
                        f"{self._storage.url}: {task} is in the commits {both}; two runs wrote here at once"
                    )
                seen[task] = manifest.commit
