"""eval.json: the results of all parts, with the settings and the environment of the run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from lab.corpus.manifest import sha256
from lab.evaluate.code import CodeResult
from lab.evaluate.equality import EqualityResult
from lab.evaluate.faithful import FaithfulResult
from lab.evaluate.loss import LossResult
from lab.evaluate.needles import NeedlesResult
from lab.evaluate.verdict import Verdict

FILE_NAME = "eval.json"
PARTS = ("faithful", "needles", "code", "loss", "equality", "recall")
IN_PROCESS = ("faithful", "needles", "code", "loss")
"""Parts that ask the model in this process; equality asks a server."""
_BEGINNING = 1 << 20


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """The share of dense attention's mass (0 to 1) that a way of selecting captures."""

    by_layer: list[float]  # of rows at `beyond` and later
    by_position: list[float | None]  # of all rows, for each bucket; None if the bucket has no rows
    all: float  # of rows at `beyond` and later


class RecallOfK(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one top_k. `overlap`, for each layer: the share of the best set that the indexer selects too."""

    indexer: Captured
    oracle: Captured
    window: Captured
    overlap: list[float]
    worst_layers: list[int]  # layers where the indexer captures least, the worst first
    widest_gaps: list[int]  # layers where the indexer is furthest below the oracle, the widest gap first


class RecallResult(msgspec.Struct, frozen=True, kw_only=True):
    """The entry of recall in eval.json; `lab.recall` measures it."""

    beyond: int
    edges: list[int]  # the first positions of the buckets; the last bucket has no end
    sequences: int
    rows: int
    device: str
    dtype: str
    top_k: dict[str, RecallOfK]


class EvalResults(msgspec.Struct, kw_only=True):
    """The results of a run, or of the parts that are done so far.

    Attributes:
        settings: everything that decides the figures. Parts of an earlier run are kept only if its settings are equal.
        environment: versions and other things that should not change the figures.
        seconds: part -> how long the part took.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, float] = {}
    default_top_k: int | None = None  # the overlay's: most bars are for it
    verdicts: list[Verdict] = []
    faithful: FaithfulResult | None = None
    needles: NeedlesResult | None = None
    code: CodeResult | None = None
    loss: LossResult | None = None
    equality: EqualityResult | None = None
    recall: RecallResult | None = None

    def has(self, part: str) -> bool:
        """Whether a part is done."""
        return getattr(self, part) is not None

    def save(self, folder: Path) -> None:
        """Write eval.json. The file is replaced in one step, so it is never half written."""
        path = folder / FILE_NAME
        part = path.with_name(path.name + ".part")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        os.replace(part, path)


def load(folder: Path, settings: dict[str, Any]) -> EvalResults | None:
    """Read the folder's results; None if there are none with the same settings."""
    try:
        found = msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=EvalResults)
    except (OSError, msgspec.DecodeError):
        return None
    same = msgspec.json.decode(msgspec.json.encode(settings))
    return found if found.settings == same else None


def fingerprint(weights: Path) -> str:
    """Return a file's SHA-256. Of a folder, the names, sizes and first MiB of its .safetensors and .json files are hashed."""
    if weights.is_file():
        return sha256(weights)
    digest = hashlib.sha256()
    for path in sorted(weights.iterdir()):
        if path.suffix in (".safetensors", ".json"):
            with path.open("rb") as file:
                digest.update(f"{path.name} {path.stat().st_size}\n".encode() + file.read(_BEGINNING))
    return digest.hexdigest()
