"""What the trainer's tests share: a tiny corpus folder, and a tiny model with its student."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from engine.checkpoint.source import open_source
from engine.protocol import IndexerInfo
from lab.distill.base import open_trunk
from lab.distill.student import Student
from tests.engine.kit import VOCAB, tiny_checkpoint

CPU = torch.device("cpu")
INFO = IndexerInfo(num_heads=3, head_dim=16, rope_dim=8, default_index_top_k=16, source="indexer.safetensors")


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_corpus(
    folder: Path, *, train: tuple[int, ...] = (200,) * 24, heldout: tuple[int, ...] = (200,), seed: int = 0
) -> Path:
    """A folder as `python -m lab.corpus` leaves it, of random tokens in sequences of these lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, Any] = {}
    for number, (name, lengths) in enumerate({"train": train, "heldout": heldout}.items()):
        tokens = np.random.default_rng((seed, number)).integers(0, VOCAB, sum(lengths), dtype=np.uint16)
        np.save(folder / f"{name}.npy", tokens)
        sequences, start = [], 0
        for i, length in enumerate(lengths):
            chat = i % 2 == 1
            focus = [[length // 2, length // 2 + 9]] if chat else []
            sequences.append([start, length, "chat" if chat else "prose", ["it"], ["MIT"], focus])
            start += length
        splits[name] = {
            "file": f"{name}.npy",
            "sha256": f"{name} {seed} {lengths}",
            "tokens": start,
            "sequences": sequences,
        }
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "splits": splits}))
    return folder


class Bench:
    """A tiny random checkpoint as transformers has it, as the trainer has it, and an untrained student."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.model: LlamaForCausalLM = tiny_checkpoint(folder, **changes)
        self.source = open_source(folder)
        self.trunk = open_trunk(self.source, torch.float32, CPU)
        self.weights = self.trunk.weights

    def student(self, seed: int = 0, info: IndexerInfo = INFO) -> Student:
        config = self.trunk.config
        return Student(config, info, config.max_positions, CPU, seed)
