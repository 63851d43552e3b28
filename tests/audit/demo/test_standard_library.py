"""What is read from a library: definitions without docstrings, docstrings, sections of topics."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit.demo.standard_library import code_and_docstrings, source_files, topic_sections

_MODULE = '''"""Module text."""
import os
\x0c
LIMIT = 3

@decorated(
    by="this",
)
class Shape:
    """Class text,
    two lines."""

    def area(self):
        """Method text."""
        return "kept, though a string"

    async def later(self): "on the line of its def"

def bare():
\treturn 1
'''


def test_definitions_and_docstrings_are_separated(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text(_MODULE, encoding="utf-8")
    documents = {(x.name, x.domain): x.text for x in code_and_docstrings(tmp_path)}
    assert documents == {
        ("pack.Shape", "code"): (
            '@decorated(\n    by="this",\n)\nclass Shape:\n\n    def area(self):\n'
            '        return "kept, though a string"\n\n'
            '    async def later(self): "on the line of its def"\n'
        ),
        ("pack.bare", "code"): "def bare():\n    return 1\n",
        ("pack", "prose"): "Module text.\n",
        ("pack.Shape", "prose"): "Class text,\ntwo lines.\n",
        ("pack.Shape.area", "prose"): "Method text.\n",
        ("pack.Shape.later", "prose"): "on the line of its def\n",
    }


def test_tests_and_installed_packages_are_not_read(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/c.py",
        "test/d.py",
        "a/tests/e.py",
        "site-packages/f.py",
        "config-3.11/g.py",
        "pydoc_data/h.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n", encoding="utf-8")
    assert [path.relative_to(tmp_path).as_posix() for path in source_files(tmp_path)] == ["a/c.py", "b.py"]


def test_a_python_without_source_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="standard library's source files"):
        source_files(tmp_path)


def test_topics_are_cut_at_their_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = {"b": "Second\n******\n\nText ** two.\n\n\nInner\n=====\n\nMore.\n", "a": "No heading.\n\n---\n\nrule\n"}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", SimpleNamespace(topics=topics))
    assert [(x.name, x.domain, x.text) for x in topic_sections()] == [
        ("topics.a.0", "prose", "No heading.\n\n---\n\nrule\n"),
        ("topics.b.0", "prose", "Second\n******\n\nText ** two.\n"),
        ("topics.b.1", "prose", "Inner\n=====\n\nMore.\n"),
    ]
