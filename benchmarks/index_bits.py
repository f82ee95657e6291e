"""Measures what a cheaper index loses: captured attention, and overlap with the trained indexer's selection.

The cheaper ways are: a projection to queries in fewer bits, and layers that use the selection of the layer before.

`python -m benchmarks.index_bits --corpus DIR` uses the default model, its indexer, and held-out texts of a folder made
by `dsa corpus`. Attention stays dense, so that all ways are judged on the same inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.overlay import indexer_shapes, read_overlay
from engine.checkpoint.source import open_source
from engine.memory.quantised import quantise_4bit
from lab.distill.base import open_trunk
from lab.distill.objective import attention_target, captured_mass, top_mask
from lab.distill.sequences import CorpusSplit
from lab.distill.student import Student
from server.hub.models import resolve


def four_bits(weight: Tensor) -> Tensor:
    """Round a weight to 4 bits with `quantise_4bit`, and return the rounded values."""
    stored = quantise_4bit(weight)
    assert stored.offsets is not None
    scales, offsets = (torch.from_numpy(x).float().unsqueeze(-1) for x in (stored.scales, stored.offsets))
    return (torch.from_numpy(stored.numbers).view(len(weight), -1, 32) * scales + offsets).view_as(weight)


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "as trained": lambda weight: weight,
    "bfloat16": lambda weight: weight.bfloat16().float(),
    "4 bits": four_bits,
}

BEFORE = "set of the layer before"  # the first layer uses its own set


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--length", type=int, default=3000, help="tokens of each (%(default)s)")
    parser.add_argument("--top-k", type=int, default=256, help="(%(default)s)")
    options = parser.parse_args(arguments)
    files, cpu = resolve(), torch.device("cpu")
    assert files.overlay is not None
    source = open_source(files.weights)
    overlay = read_overlay(files.overlay, source)
    trunk = open_trunk(source, torch.float32, cpu)
    config = trunk.config
    trained = {
        name: overlay.tensors.read(name, torch.float32)
        for name in indexer_shapes(overlay.info, config.num_layers, config.hidden_size)
    }
    students = {}
    for form, changed in FORMS.items():
        students[form] = Student(config, overlay.info, config.max_positions, cpu, 0)
        students[form].load(
            {name: changed(w) if name.endswith("wq.weight") else w for name, w in trained.items()}
        )
    split = CorpusSplit.open(options.corpus, "heldout", config.vocab_size)
    texts = [text for text in split.sequences if text.length >= options.length][: options.texts]
    captured, overlap = dict.fromkeys((*FORMS, BEFORE), 0.0), dict.fromkeys((*FORMS, BEFORE), 0.0)
    rows = torch.arange(options.length // 2, options.length, 25)
    for text in texts:
        ids = split.tokens(text, options.length, cpu)
        x = trunk.embed(ids)
        before: Tensor | None = None
        for layer in range(config.num_layers):
            inputs = trunk.open(layer, x)
            allowed = inputs.visible(rows)
            target = attention_target(inputs.query[rows], inputs.keys, allowed, trunk.scale)
            sets = {
                form: top_mask(student.scores(layer, inputs, rows), allowed, options.top_k)
                for form, student in students.items()
            }
            own = sets["as trained"]
            sets[BEFORE], before = own if before is None else before, own
            for form, chosen in sets.items():
                captured[form] += float(captured_mass(target, chosen).mean())
                overlap[form] += float((chosen & own).sum() / chosen.sum())
            x = trunk.close(layer, x, trunk.attend(inputs, slice(None), None))
    each = len(texts) * config.num_layers
    for form in captured:
        print(f"{form:24} captured {captured[form] / each:.5f}  overlap {overlap[form] / each:.4f}")


if __name__ == "__main__":
    main()
