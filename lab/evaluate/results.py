"""eval.json: everything that was measured, part by part, and what it was measured on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from lab.corpus.manifest import sha256
from lab.evaluate.agreement import AgreementResult
from lab.evaluate.equality import EqualityResult
from lab.evaluate.loss import LossResult
from lab.evaluate.needles import NeedlesResult
from lab.evaluate.verdict import Verdict

FILE_NAME = "eval.json"
PARTS = ("loss", "needles", "agreement", "equality", "recall")
_BEGINNING = 1 << 20


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """How much of dense attention's mass a way of selecting captures; 1 is all. Rows beyond `beyond`."""

    by_layer: list[float]
    by_position: list[float | None]
    all: float


class RecallOfK(msgspec.Struct, frozen=True, kw_only=True):
    """One top_k. `overlap` is the share of the best set that the indexer selects too, by layer."""

    indexer: Captured
    oracle: Captured
    window: Captured
    overlap: list[float]
    worst_layers: list[int]  # least captured by the indexer, the worst first
    widest_gaps: list[int]  # furthest below the oracle, the widest first


class RecallResult(msgspec.Struct, frozen=True, kw_only=True):
    """The part's entry in eval.json, written by `dsa recall`."""

    beyond: int
    edges: list[int]  # where the buckets of positions begin; the last one is open
    sequences: int
    rows: int
    device: str
    dtype: str
    top_k: dict[str, RecallOfK]


class EvalResults(msgspec.Struct, kw_only=True):
    """A run, whole or so far.

    Attributes:
        settings: what decides the figures; parts are kept from a run with equal ones only.
        environment: what may not decide them: versions and the like.
        seconds: part -> how long it took.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    seconds: dict[str, float] = {}
    verdicts: list[Verdict] = []
    loss: LossResult | None = None
    needles: NeedlesResult | None = None
    agreement: AgreementResult | None = None
    equality: EqualityResult | None = None
    recall: RecallResult | None = None

    def has(self, part: str) -> bool:
        """Whether a part is done."""
        return getattr(self, part) is not None

    def save(self, folder: Path) -> None:
        """Write eval.json; it is whole at every moment."""
        path = folder / FILE_NAME
        part = path.with_name(path.name + ".part")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        os.replace(part, path)


def load(folder: Path, settings: dict[str, Any]) -> EvalResults | None:
    """What an earlier run of the same settings left in the folder, if there is any."""
    try:
        found = msgspec.json.decode((folder / FILE_NAME).read_bytes(), type=EvalResults)
    except (OSError, msgspec.DecodeError):
        return None
    same = msgspec.json.decode(msgspec.json.encode(settings))
    return found if found.settings == same else None


def fingerprint(weights: Path) -> str:
    """A file's SHA-256; of a folder that of the names, sizes and first MiB of its files."""
    if weights.is_file():
        return sha256(weights)
    digest = hashlib.sha256()
    for path in sorted(weights.iterdir()):
        if path.suffix in (".safetensors", ".json"):
            with path.open("rb") as file:
                digest.update(f"{path.name} {path.stat().st_size}\n".encode() + file.read(_BEGINNING))
    return digest.hexdigest()
