"""What a job needs of this machine, in one zip file: the code, the resolved specification, local texts and weights.

Only what is named is taken, so nothing else can get in. The zip file's bytes depend on its content alone: a cluster
that has seen it does not get it again. In it::

    audit/ cluster/ jobs/   the packages as they run here
    submitted.json          their version and git revision
    config/NAME.yaml        the specification, and beside it what it names by a path below its own folder
    config/named/FIELD/     what it names by any other path
"""

from __future__ import annotations

import importlib.util
import json
import os
import posixpath
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from audit.config import AuditConfig, ConfigError, check_against
from audit.config.specification import DatasetsSource, DemoSource
from audit.corpus.files import find_files, fixed_part, is_pattern
from audit.corpus.sources import SUFFIXES, AnySource, read_documents
from audit.models import describe
from cluster.planning.identity import SUBMITTED, code_version

LIMIT = 100 * 2**20  # bytes: what the Jobs API takes in one request is below
PACKAGES = ("audit", "cluster", "jobs")
_CONFIG = "config"
_CHECKPOINT = (".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken")
_PICKLED = (".bin", ".pt", ".pth")
_PACKED = (".safetensors", ".npy", ".parquet", ".gz", ".zst", ".bz2", ".xz", ".png")  # not worth compressing
_NAMED = 3  # of the largest files, in a sentence


@dataclass(frozen=True, slots=True)
class Staged:
    """What was put together. ``files`` maps names in the zip file to bytes before compression."""

    package: Path
    config: str  # the specification's name in the zip file
    specification: Mapping[str, Any]  # what it holds
    files: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Of the zip file."""
        return self.package.stat().st_size


class _Contents:
    """Names in the zip file, and where the bytes come from."""

    def __init__(self) -> None:
        self.entries: dict[str, Path | bytes] = {}

    def add(self, name: str, content: Path | bytes) -> None:
        self.entries[name] = content

    def sizes(self) -> dict[str, int]:
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.entries.items())
        }


def check_here(config: AuditConfig, on_cluster: Sequence[Path] = ()) -> None:
    """Raise ConfigError or ModelError, one sentence, for what is wrong and shows without weights.

    What lies at a URL, on the hub or, by ``on_cluster``, on the cluster's nodes, is left for the cluster to find.
    """
    place = config.model.location(config.folder)
    if place == "demo" or (os.path.isabs(place) and not covers(on_cluster, place)):
        check_against(config, describe(place, trust_remote_code=config.model.trust_remote_code))
    places = [(isinstance(source, DemoSource), _place(source, config.folder)) for source in config.corpus.sources]
    if all(demo or (place is not None and not covers(on_cluster, place)) for demo, place in places):
        read_documents(config.corpus, config.folder)


def stage(config: AuditConfig, name: str, target: Path, on_cluster: Sequence[Path] = ()) -> Staged:
    """Write the zip file ``target`` for a specification whose file is called ``name``.

    Paths at or below one of ``on_cluster`` are the same on every node of the cluster, and nothing of them is taken.
    Raises ConfigError for what is not there, and for more than an upload takes.
    """
    contents = _Contents()
    for package in PACKAGES:
        for entry, file in _package_files(package):
            contents.add(entry, file)
    contents.add(SUBMITTED, json.dumps(code_version(), sort_keys=True).encode())
    data = config.resolved()
    data["model"]["source"] = _stage_model(config, on_cluster, contents)
    for number, source in enumerate(config.corpus.sources):
        if not isinstance(source, DemoSource):
            key = "name" if isinstance(source, DatasetsSource) else "path"
            there = _stage_source(source, key, f"corpus.sources.{number}.{key}", config.folder, on_cluster, contents)
            data["corpus"]["sources"][number][key] = there
    written = posixpath.join(_CONFIG, name)
    if written in contents.entries:
        raise ConfigError(f"corpus.sources: {name!r} itself is among the texts; put them in a folder of their own")
    contents.add(written, yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode())
    _write(contents, target)
    return Staged(target, written, data, contents.sizes())


def covers(on_cluster: Sequence[Path], path: str | Path) -> bool:
    """Whether an absolute path is at or below one of those that every node has."""
    return any(Path(path).is_relative_to(Path(os.path.abspath(there.expanduser()))) for there in on_cluster)


def size(count: int) -> str:
    """Bytes as a person says them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# What is taken -------------------------------------------------------------------------------------------------------


def _package_files(package: str) -> Iterator[tuple[str, Path]]:
    """The files of an imported package, wherever it lies: no bytecode, nothing hidden."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    for path in _visible(root):
        parts = path.relative_to(root).parts
        if "__pycache__" not in parts:
            yield posixpath.join(package, *parts), path


def _stage_model(config: AuditConfig, on_cluster: Sequence[Path], contents: _Contents) -> str:
    """Take a local checkpoint; returns what model.source is there."""
    source, place = config.model.source, config.model.location(config.folder)
    if place == "demo" or not os.path.isabs(place):
        return source
    if covers(on_cluster, place):
        return place
    files = _checkpoint_files(Path(place), pickled=config.model.allow_pickle, code=config.model.trust_remote_code)
    total = sum(file.stat().st_size for file in files)
    if total > LIMIT:
        raise ConfigError(
            f"model.source: {source!r} holds {size(total)}, an upload takes {size(LIMIT)}; name a model on the hub or "
            f"a URL such as s3://bucket/model, or add --on-cluster {place} if every node has it there"
        )
    return _take(source, place, os.path.dirname(place), files, config.folder, "model.source", contents)


def _checkpoint_files(folder: Path, *, pickled: bool, code: bool) -> list[Path]:
    """What the loaders read of a checkpoint's folder."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.source: {str(folder)!r} holds no config.json; name the folder of a checkpoint")
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    wanted = _CHECKPOINT + (".py",) * code
    if pickled and not any(file.suffix == ".safetensors" for file in files):
        wanted += _PICKLED
    return [file for file in files if file.suffix in wanted]


def _stage_source(
    source: AnySource, key: str, field: str, folder: Path, on_cluster: Sequence[Path], contents: _Contents
) -> str:
    """Take the local files of a source; returns what its path, or its name, is there."""
    given, place = str(getattr(source, key)), _place(source, folder)
    if place is None:
        return given
    if covers(on_cluster, place):
        return place
    if isinstance(source, DatasetsSource):
        return _take(given, place, os.path.dirname(place), _visible(Path(place)), folder, field, contents)
    found = find_files(given, folder, field, SUFFIXES[source.kind])
    files = [Path(file.path) for file in found.files]
    base = fixed_part(place) if is_pattern(place) and not os.path.exists(place) else os.path.dirname(place)
    return _take(given, place, base, files, folder, field, contents)


def _take(
    given: str, place: str, base: str, files: Iterable[Path], folder: Path, field: str, contents: _Contents
) -> str:
    """Add files that lie below ``base``; returns the path that leads from the specification to them there.

    A path that stays below the specification's folder is kept as it is written, so that the run is the same run.
    """
    normal = os.path.normpath(given)
    if os.path.isabs(normal) or normal.startswith(("..", "~")) or "://" in given:
        there = posixpath.join("named", field)
        given = posixpath.join(there, os.path.relpath(place, base))
    else:
        there, base = "", os.path.abspath(folder)
    for file in files:
        contents.add(posixpath.join(_CONFIG, there, Path(os.path.relpath(file, base)).as_posix()), file)
    return given


def _visible(folder: Path) -> list[Path]:
    """Every file below a folder but what is hidden, or in something hidden, in a fixed order."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _place(source: AnySource, folder: Path) -> str | None:
    """The absolute path, or pattern, of a source's files on this machine; None where they are somewhere else."""
    if isinstance(source, DemoSource):
        return None
    if isinstance(source, DatasetsSource):
        local = os.path.abspath(folder / source.name)
        return local if os.path.exists(local) else None
    if "://" in source.path and not source.path.startswith("file://"):
        return None
    return os.path.abspath(folder / Path(source.path.removeprefix("file://")).expanduser())


# The zip file --------------------------------------------------------------------------------------------------------


def _write(contents: _Contents, target: Path) -> None:
    """Raises ConfigError as soon as the file is larger than an upload may be."""
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in sorted(contents.entries.items()):
            entry = zipfile.ZipInfo(name)  # of the year 1980, so that equal contents are equal bytes
            entry.external_attr = 0o644 << 16
            packed = name.endswith(_PACKED)
            entry.compress_type = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as sink:
                if isinstance(content, bytes):
                    sink.write(content)
                else:
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, sink, 1 << 20)
            if target.stat().st_size >= LIMIT:
                raise ConfigError(_too_large(contents.sizes()))
    if target.stat().st_size >= LIMIT:
        raise ConfigError(_too_large(contents.sizes()))


def _too_large(sizes: Mapping[str, int]) -> str:
    largest = sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))[:_NAMED]
    named = ", ".join(f"{name.removeprefix(f'{_CONFIG}/')} ({size(count)})" for name, count in largest)
    return (
        f"upload: the files that the configuration names are more than the {size(LIMIT)} that a cluster takes, even "
        f"compressed; the largest are {named}; name URLs, or add --on-cluster PATH for what every node has"
    )
