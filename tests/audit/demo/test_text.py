"""The split of the demo's text: held-out documents are unseen, enough, in a stable order, and the rest is counted."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from audit.demo import text
from audit.demo.overlap import SeenText
from audit.demo.text import DOMAINS, MAX_CHARACTERS, held_out, training_documents
from audit.documents import Document


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Document]]:
    """Stands in for the library's documents: a list the test fills before it reads."""
    documents: list[Document] = []
    monkeypatch.setattr(text, "code_and_docstrings", lambda: documents)
    monkeypatch.setattr(text, "topic_sections", list)
    text.documents.cache_clear()
    yield documents
    text.documents.cache_clear()


def _goes_to_held_out(content: str) -> bool:
    """The split as the model card words it: the lowest fifth of the hashes of the normalised texts."""
    normalised = " ".join(re.findall("[A-Za-z0-9_]+", content))
    return int(hashlib.sha256(normalised.encode()).hexdigest(), 16) / 2**256 < 0.2


def _definition(number: int, revision: int = 0) -> str:
    body = "\n".join(f"    value_{number}_{line} = call_{line}({number}, {line})" for line in range(12))
    return f"def function_{number}():\n    revision = {revision}\n{body}\n"


def _numbers_held_out(count: int) -> list[int]:
    return [n for n in range(count) if _goes_to_held_out(_definition(n))]


def test_enough_documents_in_every_domain() -> None:
    counts = Counter(document.domain for document in held_out().documents)
    assert all(counts[domain] >= 300 for domain in DOMAINS), counts


def test_no_held_out_document_shares_a_long_run_of_words_with_training() -> None:
    def runs(content: str) -> set[int]:
        tokens = re.findall("[A-Za-z0-9_]+", content)
        return {hash(tuple(tokens[start : start + 23])) for start in range(len(tokens) - 22)}

    trained = set().union(*(runs(document.text) for document in training_documents()))
    unseen = held_out()
    assert [document.name for document in unseen.documents if runs(document.text) & trained] == []
    assert all(unseen.dropped[domain] > 0 for domain in ("code", "prose"))  # the drop had something to do


@pytest.mark.parametrize(
    ("domains", "count", "message"),
    [
        (("code", "poetry"), None, "no domain 'poetry'"),
        (("math",), 100_000, "100000 asked for"),
        (("math",), 0, "give 1 or more"),
    ],
)
def test_mistakes_are_named(domains: tuple[str, ...], count: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        held_out(domains, count, seen=SeenText.of([]))


def test_the_split_is_the_hash_of_the_words(library: list[Document]) -> None:
    library += [Document(f"m.f{n}", "code", _definition(n)) for n in range(200)]
    unseen = held_out(("code",), seen=SeenText.of([]))
    expected = {f"m.f{n}" for n in _numbers_held_out(200)}
    assert {document.name.split("#")[0] for document in unseen.documents} == expected
    assert {x.name.split("#")[0] for x in training_documents() if x.domain == "code"}.isdisjoint(expected)


def test_a_revised_copy_of_training_text_is_dropped_and_counted(library: list[Document]) -> None:
    first = next(n for n in range(1_000) if not _goes_to_held_out(_definition(n)))
    revision = next(r for r in range(1, 1_000) if _goes_to_held_out(_definition(first, r)))
    fresh = next(n for n in range(first + 1, 1_000) if _goes_to_held_out(_definition(n)))
    seen = SeenText.of([_definition(first)])
    library += [
        Document("new.revised", "code", _definition(first, revision)),
        Document("new.fresh", "code", _definition(fresh)),
    ]
    unseen = held_out(("code",), seen=seen)
    assert [document.name.split("#")[0] for document in unseen.documents] == ["new.fresh"]
    assert unseen.dropped == {"code": 1}


def test_order_depends_on_the_seed_and_not_on_the_order_of_files(library: list[Document]) -> None:
    library += [Document(f"m.f{n}", "code", _definition(n)) for n in range(200)]
    forwards = held_out(("code",), 10, seed=3, seen=SeenText.of([]))
    library.reverse()
    text.documents.cache_clear()
    backwards = held_out(("code",), 10, seed=3, seen=SeenText.of([]))
    other = held_out(("code",), 10, seed=4, seen=SeenText.of([]))
    assert forwards == backwards
    assert len(forwards.documents) == 10
    assert [x.name for x in other.documents] != [x.name for x in forwards.documents]
    assert other.digest != forwards.digest


def test_copies_count_once_and_short_texts_not_at_all(library: list[Document]) -> None:
    copied = next(n for n in range(1_000) if _goes_to_held_out(_definition(n)))
    library += [
        Document("a", "code", _definition(copied)),
        Document("b", "code", _definition(copied).replace("    ", "  ")),
        Document("c", "code", " ".join(["word"] * 31)),
    ]
    assert [document.name.split("#")[0] for document in text.documents() if document.domain == "code"] == ["a"]


def test_long_documents_end_at_a_line_and_are_counted(library: list[Document]) -> None:
    contents = ("\n".join(f"line {i} of document {n}" for i in range(100)) + "\n" for n in range(1_000))
    content = next(content for content in contents if _goes_to_held_out(content))
    library.append(Document("long", "prose", content))
    unseen = held_out(("prose",), seen=SeenText.of([]))
    [document] = unseen.documents
    assert content.startswith(document.text)
    assert document.text.endswith("\n")
    assert MAX_CHARACTERS - 30 < len(document.text) <= MAX_CHARACTERS
    assert unseen.shortened == {"prose": 1}
