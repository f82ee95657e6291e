"""Documents: cleaned text with its origin, and the sections in it. `lab.corpus.dedupe` removes repetitions."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lab.corpus.extract import texts
from lab.corpus.fetch import fetch, files
from lab.corpus.sources import CorpusSource, SplitName, TextKind

MIN_CHARS = 300
_COMMON = re.compile(r"\b(?:the|of|to|and|a|is|in|that|for|it|be|as|with|this)\b", re.I)
# A comment in a code sample looks like a heading, but has no empty lines around it.
_HEADING = re.compile(r"(?:^|(?<=\n\n))#{1,6} (.+)\n(?=\n)")


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `source` is the name of its row in `SOURCES`."""

    source: str
    path: str
    kind: TextKind
    split: SplitName
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of a document."""

    title: str
    body: str


def clean(text: str) -> str:
    """Compose Unicode, remove invisible characters and trailing blanks, and leave at most one empty line in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u00ad\u200b-\u200f\u2028\u2029\ufeff]", "", text)
    text = text.replace("\u00a0", " ").replace("\u00b6", "")
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def acceptable(text: str, kind: TextKind) -> bool:
    """Whether a cleaned text is long enough, and is English prose or code, not tables or data."""
    if len(text) < MIN_CHARS:
        return False
    letters = sum(character.isalpha() for character in text)
    plain = sum(character.isascii() for character in text)
    if plain < 0.95 * len(text) or letters < 0.4 * len(text):
        return False
    if kind == "code":
        return max(map(len, text.splitlines())) < 1000
    return len(_COMMON.findall(text)) >= 0.12 * len(re.findall(r"[A-Za-z]+", text))


def sections(text: str) -> list[Section]:
    """Return the titled parts of a text, in order. Text before the first heading is left out."""
    marks = list(_HEADING.finditer(text))
    if not marks:
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end].strip()
        title = re.sub(r"^[\d.A-Z]{1,8}\.\s+|[`*\\]", "", mark[1]).strip(" .:")
        if body and 3 <= len(title) <= 100:
            found.append(Section(title, body))
    return found


def read(source: CorpusSource, cache: Path, seed: int) -> tuple[list[Document], str]:
    """Return the documents of a source, sorted by path, and the package's version.

    If the source has more than `max_chars`, folders are taken in a seeded random order. Files of one folder belong
    together, so a sequence made of neighbours has something to look back at.

    Raises:
        FetchError: the package could not be fetched.
    """
    tree, version = fetch(source, cache)
    folders: dict[Path, list[Path]] = {}
    for path in files(source, tree):
        folders.setdefault(path.parent, []).append(path)
    order = list(folders)
    random.Random(f"{seed}:read:{source.name}").shuffle(order)
    documents, size = [], 0
    for folder in order:
        for path in folders[folder]:
            for number, raw in enumerate(texts(source.reader, path)):
                text = clean(raw)
                if size > source.max_chars or not acceptable(text, source.kind):
                    continue
                name = f"{path.relative_to(tree).as_posix()}#{number}"
                documents.append(Document(source.name, name, source.kind, source.split, text))
                size += len(text)
    return sorted(documents, key=lambda document: document.path), version


def gather(
    sources: Iterable[CorpusSource],
    cache: Path,
    seed: int,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[list[Document], dict[str, str]]:
    """Read the documents of all sources; return them and each source's version."""
    documents: list[Document] = []
    versions: dict[str, str] = {}
    for source in sources:
        progress(source.name)
        found, versions[source.name] = read(source, cache, seed)
        documents += found
    return documents, versions


def by_kind(documents: Iterable[Document]) -> list[list[Document]]:
    """Group documents by kind. Draw a group first and then a document, else most would be code."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.kind, []).append(document)
    return [groups[kind] for kind in sorted(groups)]


def with_text(document: Document, text: str) -> Document:
    """Return the same document with other text."""
    return replace(document, text=text)
