"""The demo's text: what the model is trained on, and the held-out documents that audits read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from audit.demo.arithmetic import problems
from audit.demo.overlap import SeenText, text_hash, words
from audit.demo.standard_library import code_and_docstrings, topic_sections
from audit.documents import Document

DOMAINS = ("code", "prose", "math")
CHECKPOINT = Path(__file__).parent / "checkpoint"
SEEN_TEXT = "seen_text.npy"

MIN_WORDS = 32  # shorter texts are skipped: too little context to predict from, too little text to recognise
MAX_CHARACTERS = 1_500  # a held-out document ends at the last full line within; about the model's context
HELD_OUT_SHARE = 0.2
PROBLEMS = 5_000
_MATH_SEED = 0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Documents the demo model has not seen, with what was left out to make sure of it."""

    documents: list[Document]
    dropped: dict[str, int]  # per domain, how many share text with the training documents and were left out
    shortened: dict[str, int]  # per domain, how many of the documents are only the beginning of a longer text
    digest: str  # SHA-256 over the normalised texts of the documents, in order


def held_out(
    domains: Sequence[str] = DOMAINS,
    documents_per_domain: int | None = None,
    seed: int = 0,
    seen: SeenText | None = None,
) -> HeldOut:
    """The held-out documents of the domains, read from the running Python and cut after 1,500 characters.

    A document is held out if the hash of its normalised text says so, and dropped if it nevertheless contains a run
    of words that training saw (``SeenText``; by default the packaged model's): a revised copy in another module, or
    in another version of Python. The seed sets the order within a domain, and so which ``documents_per_domain`` are
    taken; file names and the order of files do not matter.

    Raises ValueError for an unknown domain, and if a domain has fewer documents than asked for.
    """
    if documents_per_domain is not None and documents_per_domain < 1:
        raise ValueError(f"documents_per_domain: {documents_per_domain} is no number of documents; give 1 or more")
    unknown = [domain for domain in domains if domain not in DOMAINS]
    if unknown:
        raise ValueError(f"domains: the demo text has no domain {unknown[0]!r}; it has {', '.join(DOMAINS)}")
    if seen is None:
        seen = SeenText.load(CHECKPOINT / SEEN_TEXT)
    chosen: list[Document] = []
    dropped: dict[str, int] = {}
    shortened: dict[str, int] = {}
    for domain in domains:
        candidates = [document for document in documents() if document.domain == domain and is_held_out(document)]
        unseen = [document for document in candidates if not seen.contains_part_of(_beginning(document.text))]
        dropped[domain] = len(candidates) - len(unseen)
        if documents_per_domain is not None and documents_per_domain > len(unseen):
            raise ValueError(
                f"documents_per_domain: {documents_per_domain} asked for, but this Python's text gives "
                f"{len(unseen)} held-out documents of domain {domain!r}; ask for at most that many"
            )
        unseen.sort(key=lambda document: _seeded_key(document, seed))
        taken = unseen[:documents_per_domain]
        shortened[domain] = sum(len(document.text) > MAX_CHARACTERS for document in taken)
        chosen += [replace(document, text=_beginning(document.text)) for document in taken]
    return HeldOut(chosen, dropped, shortened, digest(chosen))


def training_documents() -> list[Document]:
    """The documents the demo model is trained on, whole, in the order of domain and name."""
    return [document for document in documents() if not is_held_out(document)]


def digest(chosen: Iterable[Document]) -> str:
    """SHA-256 (hexadecimal) over the normalised texts of the documents, in order."""
    return hashlib.sha256("\n".join(text_hash(document.text) for document in chosen).encode()).hexdigest()


def is_held_out(document: Document) -> bool:
    """The split: a function of the normalised text alone, so that it is the same under every Python."""
    return int(text_hash(document.text)[:8], 16) < HELD_OUT_SHARE * 2**32


@cache
def documents() -> tuple[Document, ...]:
    """All documents of at least 32 words, in the order of domain and name; of equal normalised texts the first.

    Names end in eight digits of the text's hash: definitions of one name stay apart, and a changed text is renamed.
    """
    found: dict[str, Document] = {}
    for document in (*code_and_docstrings(), *topic_sections(), *problems(PROBLEMS, _MATH_SEED)):
        if len(words(document.text)) >= MIN_WORDS:
            key = text_hash(document.text)
            found.setdefault(key, replace(document, name=f"{document.name}#{key[:8]}"))
    return tuple(sorted(found.values(), key=lambda document: (DOMAINS.index(document.domain), document.name)))


def _beginning(text: str) -> str:
    """The text's first lines, up to MAX_CHARACTERS; a longer first line is cut within."""
    if len(text) <= MAX_CHARACTERS:
        return text
    end = text.rfind("\n", 0, MAX_CHARACTERS) + 1
    return text[: end or MAX_CHARACTERS]


def _seeded_key(document: Document, seed: int) -> str:
    return hashlib.sha256(f"{seed} {text_hash(document.text)}".encode()).hexdigest()
