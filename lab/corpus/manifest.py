"""What a built corpus consists of: the types of its JSON files, and reading the token files by them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from lab.corpus.chatml import ChatTurn

VERSION = 1
FILE_NAME = "manifest.json"


class SourceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table of sources, as it was found."""

    name: str
    package: str
    version: str
    fetch: str
    kind: str
    split: str
    licence: str
    documents: int  # after deduplication
    chars: int
    tokens: int  # of running text that was used; chats and retrieval sequences draw on it besides


class SequenceInfo(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Where a sequence lies in its split's file, and what it is."""

    start: Annotated[int, msgspec.Meta(ge=0)]
    length: Annotated[int, msgspec.Meta(ge=1)]
    kind: str
    sources: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    focus: tuple[tuple[int, int], ...] = ()  # spans [start, end) inside the sequence: the assistant's turns


class SplitInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One token file."""

    file: str
    sha256: str
    tokens: int
    tokens_by_kind: dict[str, int]
    sequences: tuple[SequenceInfo, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A corpus. `files` are the others beside the token files, with their SHA-256."""

    version: int
    seed: int
    target_tokens: int
    separator: int  # the token between documents of one sequence
    removed: dict[str, int]  # how often each rule of deduplication struck
    sources: tuple[SourceInfo, ...]
    splits: dict[str, SplitInfo]
    files: dict[str, str]


class NeedleRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of needles.json; see `lab.corpus.needles.Needle`."""

    start: int  # in needles.npy
    length: int
    context: int
    depth: float
    phrasing: int
    statement: str
    question: str
    value: str
    needle: tuple[int, int]


class CorpusPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """One row of prompts.SPLIT.json: a conversation for the model to go on with."""

    kind: str
    source: str
    tokens: int  # of the rendered prompt
    messages: tuple[ChatTurn, ...]


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a corpus."""
    return msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=Manifest)


def load_tokens(folder: Path, split: SplitInfo) -> NDArray[np.uint16]:
    """Map a split's tokens into memory; sequence `s` is `tokens[s.start : s.start + s.length]`."""
    tokens: NDArray[np.uint16] = np.load(folder / split.file, mmap_mode="r")
    return tokens
