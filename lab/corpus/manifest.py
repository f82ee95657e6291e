"""The files of a built corpus: the types of its JSON files, and functions that read manifest and token files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lab.corpus.chatml import ChatTurn
from lab.corpus.lengths import OF_8K

StoredIds = NDArray[np.uint16] | NDArray[np.uint32]
"""Token ids as a file holds them; see `compact`."""

VERSION = 1
FILE_NAME = "manifest.json"
LONG_PROMPTS = "prompts.long.json"
CODE_TASKS = "code.json"


class SourceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A source, with the version and the amount of text that was found."""

    name: str
    package: str
    version: str
    fetch: str
    kind: str
    split: str
    licence: str
    documents: int  # after deduplication
    chars: int
    tokens: int  # in sequences of running text; the tokens in chats and retrieval sequences are not counted


class SequenceInfo(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The place of a sequence in its split's file, its kind and its origin."""

    start: Annotated[int, msgspec.Meta(ge=0)]
    length: Annotated[int, msgspec.Meta(ge=1)]
    kind: str
    sources: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    focus: tuple[tuple[int, int], ...] = ()  # spans [start, end) inside the sequence: the assistant's turns


class SplitInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One token file and the sequences in it."""

    file: str
    sha256: str
    tokens: int
    tokens_by_kind: dict[str, int]
    sequences: tuple[SequenceInfo, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A corpus. `files` has the files that are not token files of a split: name -> SHA-256."""

    version: int
    seed: int
    target_tokens: int
    separator: int  # the token between documents of one sequence
    removed: dict[str, int]  # how often each rule of deduplication applied
    sources: tuple[SourceInfo, ...]
    splits: dict[str, SplitInfo]
    files: dict[str, str]
    context: int = OF_8K.context  # the key of its lengths in `lab.corpus.lengths.BY_CONTEXT`


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
    """One row of prompts.SPLIT.json: a conversation that the model has to continue."""

    kind: str
    source: str
    tokens: int  # of the rendered prompt
    messages: tuple[ChatTurn, ...]


class CodeCase(msgspec.Struct, frozen=True, kw_only=True):
    """One test of a code task: the function called with these arguments gives this."""

    arguments: list[Any]
    expected: Any


class CodeTask(msgspec.Struct, frozen=True, kw_only=True):
    """One row of code.json; see `lab.corpus.codetasks`."""

    kind: str
    tokens: int  # of the rendered prompt
    depth: float  # where among the pasted files the one with the rule stands, 0 to 1
    messages: tuple[ChatTurn, ...]
    package: str
    module: str  # the file with the rule, importable as `package.module`
    spec: str  # its text
    function: str  # the name of what is to be written
    cases: tuple[CodeCase, ...]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a corpus."""
    return msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=Manifest)


def compact(ids: NDArray[np.uint32]) -> StoredIds:
    """Return tokens as they are stored: in 16 bits if the largest of them allows it, else in 32."""
    return ids.astype(np.uint16) if not len(ids) or int(ids.max()) < 1 << 16 else ids


def load_tokens(folder: Path, split: SplitInfo) -> StoredIds:
    """Map a split's tokens into memory; sequence `s` is `tokens[s.start : s.start + s.length]`."""
    tokens: StoredIds = np.load(folder / split.file, mmap_mode="r")
    return tokens
