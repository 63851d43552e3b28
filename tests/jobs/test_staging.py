"""What a job is sent: what the configuration names and the code, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray._private import ray_constants

from audit.config import AuditConfig, ConfigError
from audit.corpus.sources import read_documents
from cluster.submission import staging
from cluster.submission.staging import check_here, covers, stage


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A project like a person's: a configuration, texts, a checkpoint, and a lot that is nobody's business."""
    home = tmp_path / "home"
    for name, text in {
        "project/texts/a.txt": "first",
        "project/texts/deep/b.txt": "second",
        "project/texts/.secret": "no",
        "project/texts/.cache/c.txt": "no",
        "project/.git/config": "no",
        "project/.venv/lib/module.py": "no",
        "project/runs/one/run.json": "no",
        "project/notes.txt": "no",
        "project/model/config.json": "{}",
        "project/model/model.safetensors": "weights",
        "project/model/tokenizer.json": "{}",
        "project/model/pytorch_model.bin": "pickle",
        "project/model/modeling.py": "code",
        "project/model/.git/HEAD": "no",
        "project/model/onnx/model.json": "no",
        "elsewhere/x.txt": "third",
        "elsewhere/y.txt": "fourth",
        "elsewhere/z.md": "no",
        "rows/r.jsonl": '{"text": "fifth"}\n',
        "rows/readme.md": "no",
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    pq.write_table(pa.table({"text": ["sixth"]}), home / "table.parquet")
    return home


def write(home: Path, sources: Sequence[dict[str, object]], source: str = "demo", **model: object) -> AuditConfig:
    data = {"model": {"source": source, **model}, "corpus": {"sources": list(sources)}}
    (home / "project" / "audit.yaml").write_text(yaml.safe_dump(data))
    return AuditConfig.load(home / "project" / "audit.yaml")


def text(path: str) -> dict[str, object]:
    return {"kind": "text", "path": path, "domain": "prose"}


def unpacked(config: AuditConfig, target: Path, on_cluster: Sequence[Path] = ()) -> tuple[AuditConfig, set[str]]:
    """The configuration as a job finds it, and the names of what came with it."""
    staged = stage(config, "audit.yaml", target / "job.zip", on_cluster)
    with zipfile.ZipFile(staged.package) as archive:
        archive.extractall(target / "there")
        names = set(archive.namelist())
    assert names == set(staged.files)
    there = AuditConfig.load(target / "there" / staged.config)
    assert there.resolved() == staged.specification
    return there, {name for name in names if not name.startswith(("audit/", "cluster/", "jobs/"))}


def test_nothing_is_sent_but_what_is_named(place: Path, tmp_path: Path) -> None:
    there, names = unpacked(write(place, [text("texts")], source="./model"), tmp_path)
    assert names == {
        "submitted.json",
        "config/audit.yaml",
        "config/texts/a.txt",
        "config/texts/deep/b.txt",
        "config/model/config.json",
        "config/model/model.safetensors",
        "config/model/tokenizer.json",
    }
    assert there.model.source == "./model"


def test_code_and_pickles_of_a_checkpoint_are_sent_where_they_are_asked_for(place: Path, tmp_path: Path) -> None:
    config = write(place, [{"kind": "demo"}], source="./model", trust_remote_code=True, allow_pickle=True)
    assert "config/model/modeling.py" in unpacked(config, tmp_path / "1")[1]
    assert "config/model/pytorch_model.bin" not in unpacked(config, tmp_path / "2")[1]  # safetensors come first
    (place / "project" / "model" / "model.safetensors").unlink()
    assert "config/model/pytorch_model.bin" in unpacked(config, tmp_path / "3")[1]


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for number in "123":
        (tmp_path / number).mkdir()


def test_documents_and_their_names_are_the_same_there(place: Path, tmp_path: Path) -> None:
    sources = [
        text("texts"),
        text("texts/*.txt"),
        text("texts/a.txt"),
        text("../elsewhere/*.txt"),
        text(str(place / "elsewhere")),
        text(str(place / "elsewhere" / "z.md")),
        {"kind": "jsonl", "path": str(place / "rows"), "domain": "prose"},
        {"kind": "jsonl", "path": "~/rows/*.jsonl", "domain": "prose"},
        {"kind": "parquet", "path": "../table.parquet", "domain": "prose"},
    ]
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(place)
    try:
        config = write(place, sources)
        check_here(config)
        here, _ = read_documents(config.corpus, config.folder)
        there, names = unpacked(config, tmp_path)
    finally:
        os.environ["HOME"] = before or ""
    found, _ = read_documents(there.corpus, there.folder)
    assert len(here) == 2 + 1 + 1 + 2 + 3 + 1 + 1 + 1 + 1
    assert found == here
    assert not any("readme" in name or "secret" in name for name in names)
    # Below the configuration's folder paths stay as they are, so that the run folder is the same run's.
    assert [source.path for source in there.corpus.sources[:3]] == ["texts", "texts/*.txt", "texts/a.txt"]  # type: ignore[union-attr]


def test_a_configuration_among_the_texts_is_refused(place: Path, tmp_path: Path) -> None:
    for path in (".", "*.yaml"):
        with pytest.raises(ConfigError, match=r"'audit\.yaml' itself is among the texts"):
            stage(write(place, [text(path)]), "audit.yaml", tmp_path / "job.zip")


def test_what_every_node_has_is_neither_sent_nor_looked_for(place: Path, tmp_path: Path) -> None:
    config = write(place, [text("/data/texts"), text("../elsewhere"), text("s3://bucket/t")], source="/data/model")
    shared = [Path("/data"), place / "elsewhere"]
    check_here(config, shared)
    there, names = unpacked(config, tmp_path, shared)
    assert names == {"submitted.json", "config/audit.yaml"}
    assert there.model.source == "/data/model"
    paths = [source.path for source in there.corpus.sources]  # type: ignore[union-attr]
    assert paths == ["/data/texts", str(place / "elsewhere"), "s3://bucket/t"]
    assert not covers([Path("/data")], "/database/model")


def test_equal_contents_are_equal_bytes(place: Path, tmp_path: Path) -> None:
    config = write(place, [text("texts")], source="./model")
    first = stage(config, "audit.yaml", tmp_path / "1.zip").package.read_bytes()
    os.utime(place / "project" / "texts" / "a.txt", (1e9, 1e9))
    assert stage(config, "audit.yaml", tmp_path / "2.zip").package.read_bytes() == first
    (place / "project" / "texts" / "a.txt").write_text("changed")
    assert stage(config, "audit.yaml", tmp_path / "3.zip").package.read_bytes() != first


def test_too_much_is_refused_with_the_largest_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "LIMIT", 12 << 20)  # the code and the demo model take 8 of it
    large = place / "project" / "model" / "model.safetensors"
    large.write_bytes(b"\0" * (13 << 20))  # weights count as they are: they do not compress
    with pytest.raises(ConfigError) as refused:
        stage(write(place, [text("texts")], source="./model"), "audit.yaml", tmp_path / "1.zip")
    for part in ("model.source: './model' holds 13.0 MiB", "takes 12.0 MiB", "--on-cluster", str(large.parent)):
        assert part in str(refused.value)
    (place / "project" / "texts" / "noise.txt").write_bytes(os.urandom(11 << 20))
    (place / "project" / "texts" / "zeros.txt").write_bytes(b" " * (30 << 20))
    with pytest.raises(ConfigError) as refused:
        stage(write(place, [text("texts")]), "audit.yaml", tmp_path / "2.zip")
    assert "texts/zeros.txt (30.0 MiB), texts/noise.txt (11.0 MiB)" in str(refused.value)
    (place / "project" / "texts" / "noise.txt").unlink()
    assert stage(write(place, [text("texts")]), "audit.yaml", tmp_path / "3.zip").bytes < 12 << 20  # it compresses


def test_the_limit_is_what_the_jobs_api_takes() -> None:
    assert ray_constants.DASHBOARD_CLIENT_MAX_SIZE == staging.LIMIT


def test_the_code_runs_from_the_upload_alone(place: Path, tmp_path: Path) -> None:
    """The packages are those of this process, and know their version without a checkout around them."""
    staged = stage(write(place, [text("texts")]), "audit.yaml", tmp_path / "job.zip")
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in staged.files)
    with zipfile.ZipFile(staged.package) as archive:
        archive.extractall(tmp_path / "there")
    code = (
        "import audit, cluster, jobs.run_audit; from cluster.planning.identity import code_version;"
        "from audit.models import describe; describe('demo');"
        "print(audit.__file__); print(sorted(code_version().items()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "there", capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert found[-2] == str(tmp_path / "there" / "audit" / "__init__.py")
    assert found[-1] == str(sorted(staging.code_version().items()))
