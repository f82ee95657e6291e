"""Measures how much of dense attention three selections capture: the indexer's, the best possible, and a window.

It uses the trainer's forward pass with dense attention, so every layer is judged on the inputs that dense attention
gives it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from engine.checkpoint.overlay import indexer_shapes, read_overlay
from engine.checkpoint.source import open_source
from engine.errors import ConfigError
from engine.models.gqa.trunk import Trunk
from engine.step.build import resolve_device, resolve_dtype
from lab.corpus.manifest import SequenceInfo
from lab.distill.base import open_trunk
from lab.distill.evaluate import BEYOND
from lab.distill.objective import attention_target, captured_mass, index_logits, top_mask
from lab.distill.sequences import CorpusSplit
from lab.distill.sparse_forward import by_window
from lab.distill.student import Student
from server.hub.models import ModelFiles

EDGES = (0, 256, 512, 1024, 2048, 4096)
"""The first positions of the buckets. The last bucket has no end."""
WAYS = ("indexer", "oracle", "window")
SINKS = 4
_ROWS_AT_ONCE = 256


@dataclass
class Sums:
    """Sums over rows for one top_k, float64.

    Attributes:
        mass: [ways, layers, buckets] captured attention
        overlap: [layers, buckets] share of the best set that the indexer selects too
        beyond: [ways, layers] `mass` of the rows at `BEYOND` and later
        overlap_beyond: [layers] `overlap` of the rows at `BEYOND` and later
    """

    mass: Tensor
    overlap: Tensor
    beyond: Tensor
    overlap_beyond: Tensor

    @classmethod
    def zeros(cls, layers: int) -> Sums:
        """Make sums that are all 0."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(
            zeros(len(WAYS), layers, len(EDGES)), zeros(layers, len(EDGES)),
            zeros(len(WAYS), layers), zeros(layers),
        )  # fmt: skip


class Recall:
    """Adds up captured attention over texts.

    Args:
        trunk: the dense model
        student: the indexers to judge
        index_top_ks: how many tokens a row may select
        beyond: position from which on a row counts in the means over positions
    """

    def __init__(
        self, trunk: Trunk, student: Student, index_top_ks: Sequence[int], beyond: int = BEYOND
    ) -> None:
        self._trunk, self._student, self._beyond = trunk, student, beyond
        self.sums = {k: Sums.zeros(trunk.config.num_layers) for k in index_top_ks}
        self.rows = torch.zeros(len(EDGES), dtype=torch.float64)
        self.rows_beyond = 0
        self.texts = 0

    @torch.no_grad()
    def add(self, tokens: Tensor, count: int, layer_done: Callable[[], None] = lambda: None) -> None:
        """Add one text, tokens [T], with `count` rows at even distances (0: all rows)."""
        total = len(tokens)
        number = total if not count else min(count, total)
        rows = (((torch.arange(number) + 1) * total) // number - 1).to(tokens.device)
        bucket = torch.bucketize(rows.cpu(), torch.tensor(EDGES), right=True) - 1
        late = rows.cpu() >= self._beyond
        self.texts += 1
        self.rows += torch.bincount(bucket, minlength=len(EDGES))
        self.rows_beyond += int(late.sum())
        x = self._trunk.embed(tokens)
        for layer in range(self._trunk.config.num_layers):
            inputs = self._trunk.open(layer, x)
            keys = self._student.keys(layer, inputs)
            for part in torch.split(torch.arange(number), _ROWS_AT_ONCE):
                own = rows[part.to(rows.device)]
                allowed = inputs.visible(own)
                target = attention_target(inputs.query[own], inputs.keys, allowed, self._trunk.scale)
                queries = self._student.queries(layer, inputs, own)
                scores = index_logits(queries.query, queries.head_weights, keys)
                for k, sums in self.sums.items():
                    best = top_mask(target, allowed, k)
                    chosen = top_mask(scores, allowed, k)
                    window = by_window(k, SINKS)(layer, inputs, own)
                    shared = (best & chosen).sum(-1).double() / best.sum(-1)
                    masses = torch.stack([captured_mass(target, mask) for mask in (chosen, best, window)])
                    _add(sums, layer, masses.double().cpu(), shared.cpu(), bucket[part], late[part])
            x = self._trunk.close(layer, x, self._trunk.attend(inputs, slice(None), None))
            layer_done()

    def result(self) -> dict[str, dict[str, Any]]:
        """Return the means: top_k -> the fields of `lab.evaluate.results.RecallOfK`."""
        layers, late = self._trunk.config.num_layers, max(self.rows_beyond, 1)
        made: dict[str, dict[str, Any]] = {}
        for k, sums in self.sums.items():
            of_k: dict[str, Any] = {}
            for i, way in enumerate(WAYS):
                by_position = (sums.mass[i].sum(0) / (layers * self.rows.clamp_min(1))).tolist()
                of_k[way] = {
                    "by_layer": (sums.beyond[i] / late).tolist(),
                    "by_position": [
                        v if n else None for v, n in zip(by_position, self.rows.tolist(), strict=True)
                    ],
                    "all": float(sums.beyond[i].mean()) / late,
                }
            own, oracle = sums.beyond[0], sums.beyond[1]
            of_k["overlap"] = (sums.overlap_beyond / late).tolist()
            of_k["worst_layers"] = own.argsort(stable=True).tolist()
            of_k["widest_gaps"] = (own - oracle).argsort(stable=True).tolist()
            made[str(k)] = of_k
        return made


def _add(sums: Sums, layer: int, masses: Tensor, shared: Tensor, bucket: Tensor, late: Tensor) -> None:
    sums.mass[:, layer].index_add_(1, bucket, masses)
    sums.overlap[layer].index_add_(0, bucket, shared)
    sums.beyond[:, layer] += masses[:, late].sum(-1)
    sums.overlap_beyond[layer] += shared[late].sum()


def run(
    files: ModelFiles, corpus: Path, *, index_top_k: Sequence[int], device: str, dtype: str, per_kind: int = 4,
    rows: int = 512,
) -> dict[str, Any]:  # fmt: skip
    """Measure; return the JSON object that `dsa recall` writes. Its help describes the arguments.

    Raises:
        EngineError: the checkpoint, the overlay, the corpus or the device cannot be used.
    """
    if files.overlay is None:
        raise ConfigError(f"{files.name} has no indexer; give one with --overlay")
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    source = open_source(files.weights)
    overlay = read_overlay(files.overlay, source)
    trunk = open_trunk(overlay.over(source), kind, place)
    config = trunk.config
    student = Student(config, overlay.info, config.max_positions, place, 0)
    names = indexer_shapes(overlay.info, config.num_layers, config.hidden_size)
    student.load({name: overlay.tensors.read(name, torch.float32) for name in names})
    split = CorpusSplit.open(corpus, "heldout", config.vocab_size)
    texts = chosen(split, per_kind) if config.max_positions >= 2 * BEYOND else []
    if not texts:
        raise ConfigError(
            f"recall takes held-out texts, and room in the model, of {2 * BEYOND} tokens; build a larger corpus"
        )
    recall = Recall(trunk, student, index_top_k)
    console = Console(stderr=True)
    for text in track(texts, "recall", console=console, disable=not console.is_terminal):
        recall.add(split.tokens(text, config.max_positions, place), rows)
        if not console.is_terminal and recall.texts in (1, len(texts)):
            console.print(f"recall {recall.texts} of {len(texts)} texts", highlight=False)
    return {
        "beyond": BEYOND,
        "edges": list(EDGES),
        "sequences": recall.texts,
        "rows": int(recall.rows.sum()),
        "device": str(place),
        "dtype": str(kind).removeprefix("torch."),
        "top_k": recall.result(),
    }


def chosen(split: CorpusSplit, per_kind: int) -> list[SequenceInfo]:
    """Return the first `per_kind` texts of each kind that have at least twice `BEYOND` tokens."""
    taken: Counter[str] = Counter()
    texts = []
    for text in split.sequences:
        if text.length >= 2 * BEYOND and taken[text.kind] < per_kind:
            taken[text.kind] += 1
            texts.append(text)
    return texts
