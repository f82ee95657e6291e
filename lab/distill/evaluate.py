"""Held-out loss of dense and sparse attention, with the trainer's own forward pass.

These quick figures say how far training is. Published figures come from a running server (`dsa eval`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from engine.models.gqa.trunk import Trunk
from lab.corpus.manifest import SequenceInfo
from lab.distill.adapter import Adapter
from lab.distill.sequences import CorpusSplit
from lab.distill.sparse_forward import Selector, by_oracle, by_student, by_window, losses
from lab.distill.student import Student

BEYOND = 1024
"""Positions before this one leave out few tokens at any useful top_k, so they would dilute the difference."""


def held_out(
    trunk: Trunk,
    student: Student,
    split: CorpusSplit,
    device: torch.device,
    *,
    index_top_k: tuple[int, ...] = (256, 512),
    max_length: int = 4096,
    per_kind: int = 3,
    baselines: bool = False,
    beyond: int = BEYOND,
    adapter: Adapter | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, float]]:
    """Measure the mean loss beyond position `beyond`: selection -> kind of text (and "all") -> nats.

    Selections are `dense` and, for each k of `index_top_k`, `sparse k`, which runs as in serving. With `baselines`
    there are also `oracle k`, `window k` and, if there is an adapter, `plain k` (`sparse k` without the adapter).

    The result is empty if `per_kind` is 0, or if no sequence, cut to `max_length` and to the model's positions,
    has twice `beyond` tokens.
    """
    max_length = min(max_length, trunk.config.max_positions)
    selectors: dict[str, tuple[Selector | None, Adapter | None, int]] = {"dense": (None, None, 0)}
    for k in index_top_k:
        selectors[f"sparse {k}"] = by_student(student, k), adapter, k
        if baselines:
            if adapter is not None:
                selectors[f"plain {k}"] = by_student(student, k), None, k
            selectors[f"oracle {k}"] = by_oracle(trunk, k), None, k
            selectors[f"window {k}"] = by_window(k), None, k
    chosen: dict[str, list[SequenceInfo]] = defaultdict(list)
    for sequence in split.sequences:
        if (
            per_kind > 0
            and min(sequence.length, max_length) >= 2 * beyond
            and len(chosen[sequence.kind]) < per_kind
        ):
            chosen[sequence.kind].append(sequence)
    result: dict[str, dict[str, float]] = {}
    if not chosen:
        return result
    for name, (select, adapting, k) in selectors.items():
        progress(name)
        by_kind = {
            kind: torch.cat(
                [
                    losses(
                        trunk, split.tokens(s, max_length, device), select, adapter=adapting, index_top_k=k
                    )[beyond - 1 :]
                    for s in sequences
                ]
            )
            for kind, sequences in chosen.items()
        }
        result[name] = {kind: float(values.mean()) for kind, values in by_kind.items()}
        result[name]["all"] = float(torch.cat(list(by_kind.values())).mean())
    return result
