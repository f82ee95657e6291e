"""Removes repeated text: equal documents, nearly equal documents, and paragraphs that are often repeated.

Held-out documents come first, so text that they share with training documents is removed from the training
documents: a held-out loss must not measure memory.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lab.corpus.documents import MIN_CHARS, Document, with_text

SHINGLE = 8  # words
SKETCH = 64  # smallest shingle hashes kept of each document; similar sketches mean similar sets of shingles
NEAR = 0.5  # a document is a copy if one earlier document has this share of its sketch
PARAGRAPH = 120  # characters; shorter paragraphs ("Example:") may repeat
REPEATS = 2  # how often training text may have the same paragraph; licence headers appear thousands of times

_WORD = re.compile(r"\w+")


def sketch(text: str) -> NDArray[np.uint64]:
    """Return the `SKETCH` smallest hashes of the text's word shingles (fewer for a short text)."""
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], np.uint64)
    if len(words) < SHINGLE:
        return np.empty(0, np.uint64)
    hashes = np.zeros(len(words) - SHINGLE + 1, np.uint64)
    for offset in range(SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + len(hashes)]
    hashes ^= hashes >> np.uint64(29)  # the low words decide the high bits only after mixing
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    unique = np.unique(hashes)
    return unique[:SKETCH]


def dedupe(documents: Iterable[Document]) -> tuple[list[Document], Counter[str]]:
    """Remove repetitions; return the documents that are left, in their order, and how often each rule applied."""
    ordered = list(documents)
    struck: Counter[str] = Counter()
    exact: set[bytes] = set()
    owners: dict[int, int] = {}
    paragraphs: Counter[bytes] = Counter()
    kept: dict[int, Document] = {}
    for index in sorted(range(len(ordered)), key=lambda i: (ordered[i].split != "heldout", i)):
        document = ordered[index]
        digest = hashlib.blake2b(" ".join(document.text.split()).encode(), digest_size=16).digest()
        if digest in exact:
            struck["exact"] += 1
            continue
        exact.add(digest)
        marks = [int(value) for value in sketch(document.text)]
        hits = Counter(owners[mark] for mark in marks if mark in owners)
        if hits and hits.most_common(1)[0][1] >= NEAR * len(marks):
            struck["near"] += 1
            continue
        text, dropped = _without_repeats(document, paragraphs)
        struck["paragraph"] += dropped
        if len(text) < MIN_CHARS:
            struck["emptied"] += 1
            continue
        for mark in marks:
            owners.setdefault(mark, index)
        kept[index] = document if text == document.text else with_text(document, text)
    return [kept[index] for index in sorted(kept)], struck


def _without_repeats(document: Document, seen: Counter[bytes]) -> tuple[str, int]:
    heldout = document.split == "heldout"
    limit = 1 if heldout else REPEATS
    parts, dropped = [], 0
    for part in document.text.split("\n\n"):
        if len(part) >= PARAGRAPH:
            key = hashlib.blake2b(" ".join(part.split()).encode(), digest_size=16).digest()
            if seen[key] >= limit:
                dropped += 1
                continue
            seen[key] += REPEATS if heldout else 1  # held-out text must not appear in training text at all
        parts.append(part)
    return "\n\n".join(parts).strip(), dropped
