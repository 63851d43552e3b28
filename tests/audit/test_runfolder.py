from __future__ import annotations

import json
from pathlib import Path

import pytest

from audit.runfolder import Manifest, RunFolder, RunFolderError, difference


def begun(path: Path) -> RunFolder:
    folder = RunFolder(str(path))
    folder.begin({"identity": {}})
    return folder


def test_a_commit_counts_from_its_manifest_on(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    for commit in ("c-1", "c-2"):
        for table in ("effects", "tokens"):
            (tmp_path / table / commit).mkdir(parents=True)
            (tmp_path / table / commit / "a.parquet").touch()
    (tmp_path / "observations" / "t9-1").mkdir(parents=True)
    files = {"effects": ["effects/c-1/a.parquet"], "tokens": ["tokens/c-1/a.parquet"]}
    folder.commit(Manifest("c-1", "run", {"t1": {"rows": {"effects": 3}}}, files))
    (tmp_path / "manifests" / "c-2.json.0a1b.part").touch()  # the crash came while the manifest was written
    assert folder.done() == {"t1": {"rows": {"effects": 3}}}
    assert folder.files("effects") == [str(tmp_path / "effects/c-1/a.parquet")]
    assert folder.delete_orphans() == 3
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["effects/c-1/a.parquet", "manifests/c-1.json", "run.json", "tokens/c-1/a.parquet"]
    assert folder.delete_orphans() == 0


def test_a_task_in_two_manifests_is_found_out(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.commit(Manifest("c-1", "run", {"t1": {}}))
    folder.commit(Manifest("c-2", "run", {"t1": {}}))
    with pytest.raises(RunFolderError, match="t1 is in the commits c-1 and c-2"):
        folder.done()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    RunFolder(str(tmp_path / "new")).require_usable()
    RunFolder(str(tmp_path)).require_usable()  # empty
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"holds files but no run.json"):
        RunFolder(str(tmp_path)).require_usable()
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(str(tmp_path / "thesis.tex")).require_usable()
    begun(tmp_path).require_usable()
    assert not (tmp_path / "new").exists()


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(str(tmp_path)), RunFolder(str(tmp_path))
    with first.lock(), pytest.raises(RunFolderError, match=r"is in use by process \d+"), second.lock():
        pass
    with second.lock():
        pass


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    folder.append("progress.jsonl", {"a": 1})
    with open(tmp_path / "progress.jsonl", "a") as handle:
        handle.write('{"a": ')
    folder.append("progress.jsonl", {"a": 2})
    assert folder.lines("progress.jsonl") == [{"a": 1}, {"a": 2}]
    assert folder.lines("quarantine.jsonl") == []


def test_an_object_store_behaves_the_same() -> None:
    folder = RunFolder("memory://bucket/run1")
    folder.require_usable()
    folder.begin({"identity": {"a": 1}})
    folder.append("progress.jsonl", {"a": 1})
    folder.append("progress.jsonl", {"a": 2})
    folder.commit(Manifest("c-1", "run", {"t1": {}}, {"effects": ["effects/c-1/a.parquet"]}))
    again = RunFolder("memory://bucket/run1")
    assert again.require_run()["identity"] == {"a": 1}
    assert list(again.done()) == ["t1"]
    assert [line["a"] for line in again.lines("progress.jsonl")] == [1, 2]
    assert again.files("effects") == ["/bucket/run1/effects/c-1/a.parquet"]


def test_the_first_difference_is_named() -> None:
    old = {"seed": 0, "model": {"dtype": "float32", "source": "demo"}, "layers": [1, 2]}
    assert difference(old, json.loads(json.dumps(old))) is None
    assert difference(old, {**old, "model": {"dtype": "float16", "source": "demo"}}) == (
        "model.dtype",
        "float32",
        "float16",
    )
    assert difference(old, {**old, "layers": [1]}) == ("layers", [1, 2], [1])
    assert difference(old, {**old, "scope": "token"}) == ("scope", None, "token")
