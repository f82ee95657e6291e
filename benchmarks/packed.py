"""How fast packed weights are multiplied, kind by kind, on one core: `python -m benchmarks.packed`.

Every kind multiplies the same rows in turn, round by round, and the fastest round of each counts: by the time that the
core worked for this process, since neighbours of the machine take the rest. One row shows how fast weights are read, many rows
how fast they are multiplied. The last column is the time of bfloat16 weights divided by the kind's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import cast, get_args

import gguf
import numpy as np
import torch

from engine.kernels import native
from engine.kernels.native.packed import PackedWeight
from engine.memory.quantised import Kind, quantise_4bit, quantise_8bit
from engine.memory.superblocks import Superblocks


def weight(kind: Kind, outputs: int, inputs: int) -> PackedWeight:
    """Make a random weight [outputs, inputs] of a kind."""
    if kind in ("q4_k", "q5_k", "q6_k"):
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][1]
        rng = np.random.default_rng(0)
        blocks = rng.integers(0, 256, (outputs, inputs // 256, size), np.uint8)
        at = 208 if kind == "q6_k" else 0
        blocks[..., at : at + (2 if kind == "q6_k" else 4)] = 0x2C  # some small float16
        return PackedWeight.of(Superblocks(kind, blocks.reshape(outputs, -1)))
    plain = torch.randn(outputs, inputs)
    if kind == "q4":
        return PackedWeight.of(quantise_4bit(plain))
    return PackedWeight.of(quantise_8bit(plain) if kind == "q8" else plain)


def fastest(weights: dict[Kind, list[PackedWeight]], rows: int, rounds: int) -> dict[Kind, float]:
    """Return each kind's seconds for one product with each of its weights."""
    x = torch.randn(rows, weights["bf16"][0].inputs).bfloat16()
    best = dict.fromkeys(weights, float("inf"))
    for _ in range(rounds):
        for kind, held in weights.items():
            begin = time.process_time()
            for one in held:
                one.multiply(x, dtype=torch.float32)
            best[kind] = min(best[kind], time.process_time() - begin)
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print one line for each number of rows and kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,8,32,256", help="numbers of rows (%(default)s)")
    parser.add_argument(
        "--kinds", default=",".join(get_args(Kind)), help="kinds of weights, bf16 among them (%(default)s)"
    )
    parser.add_argument("--shape", default="8960x1536", help="outputs x inputs (%(default)s)")
    parser.add_argument("--copies", type=int, default=6, help="weights of a kind (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (%(default)s)")
    options = parser.parse_args(arguments)
    if native.library() is None:
        parser.error(str(native.missing()))
    torch.set_num_threads(1)
    native.set_threads(1)
    outputs, inputs = map(int, options.shape.split("x"))
    kinds = dict.fromkeys(["bf16", *options.kinds.split(",")])
    weights = {
        cast("Kind", kind): [weight(cast("Kind", kind), outputs, inputs) for _ in range(options.copies)]
        for kind in kinds
    }
    print(f"{native.level()}, {options.copies} weights of {outputs} x {inputs}")
    for rows in map(int, options.rows.split(",")):
        found = fastest(weights, rows, options.rounds if rows < 100 else max(2, options.rounds // 3))
        for kind, seconds in found.items():
            read = sum(one.num_bytes for one in weights[kind]) / seconds / 1e9
            products = rows * outputs * inputs * options.copies / seconds / 1e9
            ratio = found["bf16"] / seconds
            print(f"{rows:5} rows {kind:5} {read:6.1f} GB/s {products:6.1f} GMAC/s {ratio:5.2f} x bf16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
