"""What the trainer's tests share: a tiny corpus folder, and a tiny model with its student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import LlamaForCausalLM

from engine.checkpoint.source import open_source
from engine.protocol import IndexerInfo
from lab.corpus.manifest import FILE_NAME, Manifest, SequenceInfo, SplitInfo
from lab.distill.base import open_trunk
from lab.distill.student import Student
from tests.engine.kit import VOCAB, tiny_checkpoint

CPU = torch.device("cpu")
INFO = IndexerInfo(num_heads=3, head_dim=16, rope_dim=8, default_index_top_k=16, source="indexer.safetensors")


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: at this size more threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_corpus(
    folder: Path, *, train: tuple[int, ...] = (200,) * 24, heldout: tuple[int, ...] = (200,), seed: int = 0
) -> Path:
    """Write a folder like those of `dsa corpus`, with random tokens in sequences of these lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, SplitInfo] = {}
    for number, (name, lengths) in enumerate({"train": train, "heldout": heldout}.items()):
        tokens = np.random.default_rng((seed, number)).integers(0, VOCAB, sum(lengths), dtype=np.uint16)
        np.save(folder / f"{name}.npy", tokens)
        sequences, start = [], 0
        for i, length in enumerate(lengths):
            kind = "chat" if i % 2 else "prose"
            focus = ((length // 2, length // 2 + 9),) if kind == "chat" else ()
            sequences.append(SequenceInfo(start=start, length=length, kind=kind, focus=focus))
            start += length
        splits[name] = SplitInfo(
            file=f"{name}.npy", sha256=f"{name} {seed} {lengths}", tokens=start, tokens_by_kind={},
            sequences=tuple(sequences),
        )  # fmt: skip
    manifest = Manifest(
        version=1, seed=seed, target_tokens=0, separator=0, removed={}, sources=(), splits=splits, files={}
    )
    (folder / FILE_NAME).write_bytes(msgspec.json.encode(manifest))
    return folder


class Bench:
    """A tiny random checkpoint as a transformers model and as the trainer's trunk; makes untrained students."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.model: LlamaForCausalLM = tiny_checkpoint(folder, **changes)
        self.source = open_source(folder)
        self.trunk = open_trunk(self.source, torch.float32, CPU)
        self.weights = self.trunk.weights

    def student(self, seed: int = 0, info: IndexerInfo = INFO) -> Student:
        config = self.trunk.config
        return Student(config, info, config.max_positions, CPU, seed)
