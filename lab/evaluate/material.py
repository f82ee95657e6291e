"""Reads the questions (held-out sequences, needles, prompts) from a folder that `dsa corpus` has built."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from lab.corpus.manifest import (
    CODE_TASKS,
    FILE_NAME,
    LONG_PROMPTS,
    CodeTask,
    CorpusPrompt,
    NeedleRow,
    StoredIds,
    load_manifest,
    load_tokens,
    sha256,
)
from lab.tool import ToolError

T = TypeVar("T")


class MaterialError(ToolError):
    """The folder is not a corpus, or lacks a file; the message says how to build it."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out sequence."""

    kind: str
    start: int  # its first token in the split's file; names the sequence in results
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AskedNeedle:
    """A needle, with the token ids of its prompt. They end where the assistant begins to answer."""

    row: NeedleRow
    ids: tuple[int, ...]


class Material:
    """An open corpus folder.

    Attributes:
        digest: SHA-256 of the manifest. The manifest has the digests of the other files.
    """

    def __init__(self, folder: Path, model: str) -> None:
        """Open a folder.

        Args:
            folder: made by `dsa corpus`
            model: the model's name, for the advice in errors

        Raises:
            MaterialError: the folder has no corpus with a held-out split.
        """
        self._folder = folder
        self._advice = f"build one: dsa corpus --out {shlex.quote(str(folder))} --model {shlex.quote(model)}"
        try:
            self._manifest = load_manifest(folder)
            self._split = self._manifest.splits["heldout"]
            self._tokens = load_tokens(folder, self._split)
        except (OSError, KeyError, ValueError) as error:
            raise MaterialError(
                f"{folder} holds no corpus with a held-out split ({error}); {self._advice}"
            ) from None
        self.digest = sha256(folder / FILE_NAME)

    def held_out(self, shortest: int, per_kind: int | None) -> list[HeldOut]:
        """Return sequences of at least `shortest` tokens, `per_kind` of each kind (None: all), in the file's order.

        The builder has shuffled the file, so the first few sequences are a fair sample.
        """
        taken: Counter[str] = Counter()
        chosen = []
        for info in self._split.sequences:
            if info.length < shortest or (per_kind is not None and taken[info.kind] >= per_kind):
                continue
            taken[info.kind] += 1
            ids = self._tokens[info.start : info.start + info.length]
            chosen.append(HeldOut(kind=info.kind, start=info.start, ids=tuple(ids.tolist())))
        return chosen

    def needles(self, limit: int | None) -> list[AskedNeedle]:
        """Return the needles, or `limit` of them, spread evenly over the grid."""
        rows = self._rows("needles.json", tuple[NeedleRow, ...])
        try:
            tokens: StoredIds = np.load(self._folder / "needles.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise MaterialError(f"{self._folder} has no needles.npy ({error}); {self._advice}") from None
        return [
            AskedNeedle(row, tuple(tokens[row.start : row.start + row.length].tolist()))
            for row in spread(rows, limit)
        ]

    def prompts(self, limit: int | None) -> list[CorpusPrompt]:
        """Return the held-out prompts, or `limit` of them."""
        return list(spread(self._rows("prompts.heldout.json", tuple[CorpusPrompt, ...]), limit))

    def long_prompts(self, limit: int | None) -> list[CorpusPrompt]:
        """Return the long held-out prompts (`lab.corpus.longprompts`), or `limit` of them, spread over kinds and lengths."""
        return list(spread(self._rows(LONG_PROMPTS, tuple[CorpusPrompt, ...]), limit))

    @property
    def has_code(self) -> bool:
        """Whether the corpus has code tasks; those for short contexts have none."""
        return CODE_TASKS in self._manifest.files

    def code_tasks(self, limit: int | None) -> list[CodeTask]:
        """Return the code tasks, or `limit` of them, spread over kinds and lengths."""
        return list(spread(self._rows(CODE_TASKS, tuple[CodeTask, ...]), limit))

    def _rows(self, name: str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode((self._folder / name).read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError) as error:
            raise MaterialError(f"{self._folder} has no {name} ({error}); {self._advice}") from None


def spread(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """Return at most `limit` items at even distances; None returns all."""
    if limit is None or limit >= len(items):
        return items
    return [items[round((i + 0.5) * len(items) / limit - 0.5)] for i in range(limit)]
