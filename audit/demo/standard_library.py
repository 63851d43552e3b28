"""Text that every Python carries: definitions, docstrings and help topics of its own standard library."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from audit.documents import Document

# Tests, installed packages, build leftovers, and modules that are tables rather than programs.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", ".")
_UNDERLINE = re.compile(r"([=\-*~^\"#])\1{2,}\s*")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def source_files(root: Path | None = None) -> list[Path]:
    """The library's Python files in the order of their names, without tests, installed packages and tables.

    Raises ValueError where this Python carries no source text (as embedded distributions do).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py") if not _skipped(path.relative_to(root))]
    if not files:
        raise ValueError(f"the demo's text is read from the standard library's source files, and {root} has none")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def code_and_docstrings(root: Path | None = None) -> Iterator[Document]:
    """Top-level functions and classes (domain ``code``) and all docstrings (domain ``prose``) of the library.

    Docstrings are cut out of the code documents, so that the same sentences never count for both domains.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in source_files(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        with tokenize.open(path) as file:  # honours the file's declared encoding
            source = file.read()
        tree = ast.parse(source)
        lines = source.split("\n")  # as ast counts lines; str.splitlines also breaks at form feeds
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield Document(f"{module}.{node.name}", "code", _definition(node, lines))
        for name, docstring in _docstrings(tree, module):
            yield Document(name, "prose", docstring)


def topic_sections() -> Iterator[Document]:
    """The sections of ``help()``'s topics (domain ``prose``), split at their underlined headings."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        for number, section in enumerate(_sections(topics[topic])):
            yield Document(f"topics.{topic}.{number}", "prose", section)


def _skipped(relative: Path) -> bool:
    return any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in relative.parts)


def _definition(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str]) -> str:
    """The source of a definition with its decorators, without docstrings."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    assert node.end_lineno is not None
    dropped: set[int] = set()
    for inner in _statements_within(node):
        if isinstance(inner, _Documented) and ast.get_docstring(inner, clean=False) is not None:
            docstring = inner.body[0]
            assert docstring.end_lineno is not None
            if not lines[docstring.lineno - 1][: docstring.col_offset].strip():  # else it shares a line with the code
                dropped.update(range(docstring.lineno, docstring.end_lineno + 1))
    kept = [lines[number - 1] for number in range(first, node.end_lineno + 1) if number not in dropped]
    return "\n".join(kept).expandtabs(4).strip() + "\n"


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, _Documented):
        docstring = ast.get_docstring(node, clean=True)
        if docstring is not None:
            yield name, docstring.strip() + "\n"
    for child in _statements_of(node):
        inner = (
            f"{name}.{child.name}" if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else name
        )
        yield from _docstrings(child, inner)


def _statements_of(node: ast.AST) -> Iterator[ast.AST]:
    """The statements directly inside: definitions stand nowhere else, and expressions are most of a tree."""
    return (c for c in ast.iter_child_nodes(node) if isinstance(c, ast.stmt | ast.excepthandler | ast.match_case))


def _statements_within(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in _statements_of(node):
        yield from _statements_within(child)


def _sections(text: str) -> list[str]:
    """The text cut before each heading, that is a line underlined by a row of one punctuation mark."""
    lines = inspect.cleandoc(text).split("\n")
    starts = [
        number for number in range(len(lines) - 1) if lines[number].strip() and _UNDERLINE.fullmatch(lines[number + 1])
    ]
    bounds = sorted({0, *starts, len(lines)})
    return ["\n".join(lines[a:b]).strip() + "\n" for a, b in pairwise(bounds)]
