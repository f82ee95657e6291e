"""Held-out loss of dense and sparse attention, in the trainer's own forward: quick figures while training.

The figures that are published come from a running server (`dsa eval`); these say where training stands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from engine.models.gqa.trunk import Trunk
from lab.distill.adapter import Adapter
from lab.distill.sequences import Sequence, Split
from lab.distill.sparse_forward import Selector, by_oracle, by_student, by_window, losses
from lab.distill.student import Student

BEYOND = 1024
"""Positions before it have little to leave out at any top_k worth having: they would dilute the difference."""


def held_out(
    trunk: Trunk,
    student: Student,
    split: Split,
    device: torch.device,
    *,
    top_k: tuple[int, ...] = (256, 512),
    max_length: int = 4096,
    per_kind: int = 3,
    baselines: bool = False,
    beyond: int = BEYOND,
    adapter: Adapter | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, float]]:
    """Mean loss beyond position `beyond`, nats: selection -> kind of text (and "all") -> loss.

    `sparse` is as served, with the adapter if there is one, `plain` the same without it.

    Empty where the split has no sequence (or the model no room for one) of twice `beyond`, or none is
    asked for.
    """
    max_length = min(max_length, trunk.config.max_positions)
    selectors: dict[str, tuple[Selector | None, Adapter | None, int]] = {"dense": (None, None, 0)}
    for k in top_k:
        selectors[f"sparse {k}"] = by_student(student, k), adapter, k
        if baselines:
            if adapter is not None:
                selectors[f"plain {k}"] = by_student(student, k), None, k
            selectors[f"oracle {k}"] = by_oracle(trunk, k), None, k
            selectors[f"window {k}"] = by_window(k), None, k
    chosen: dict[str, list[Sequence]] = defaultdict(list)
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
