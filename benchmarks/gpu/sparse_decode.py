"""The three kernels of a sparse decode on a GPU, alone and one after the other in one graph.

    python -m benchmarks.gpu.sparse_decode --out DIR

writes sparse_decode.json: microseconds of index scores, of the selection of 2,048 and of sparse attention at 128K with
DeepSeek-V3.2's sizes (index: 64 heads of 128 in FP8; attention: 128 heads over latents of 656 bytes), for 16 and 64 rows;
`together`, the three in turn, each on what the one before has made; and the scores and the selection of a prompt's chunk of
512 rows. Medians of replayed graphs that hold each call three times. `--vendor on` lets a trial choose FlashMLA's kernel
for the attention, where it is installed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.latent_attention import SCALE
from benchmarks.gpu.latent_attention import Bench as Latents
from benchmarks.gpu.long_rows import CONTEXT, DEVICE, DIM, HEADS, PAGE, SELECTED, graph_us
from engine.kernels.triton import latent_attention
from engine.kernels.triton.rows import Rows
from engine.kernels.triton.scores import index_scores
from engine.kernels.triton.select import select

ROUNDS = 3
"""Times that a graph holds each call."""
MOST = 64
"""Contexts that lie in the cache of index keys."""
CHUNK = 512


class Bench:
    """A cache of index keys, one of latents, and what is asked of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        pages = CONTEXT // PAGE
        self._latents = Latents(CONTEXT)
        self._keys = torch.randint(0, 120, (MOST * pages, PAGE, DIM + 4), device=DEVICE, dtype=torch.uint8)
        scales = torch.rand(MOST * pages, PAGE, device=DEVICE)
        self._keys.view(MOST * pages, -1)[:, PAGE * DIM :] = scales.view(torch.uint8).view(MOST * pages, -1)
        self._table = torch.randperm(MOST * pages, device=DEVICE).view(MOST, pages).int()

    def decode(self, count: int) -> dict[str, float]:
        """Microseconds of the kernels of `count` decodes, each of a context of its own."""
        numbers = torch.arange(count, device=DEVICE, dtype=torch.int32)
        ends = torch.full_like(numbers, CONTEXT - 1)
        rows = Rows(numbers, ends, torch.full_like(numbers, SELECTED), self._table)
        query, weights = self._index_queries(count)
        latent_rows, latent_query = self._latents.rows(count), self._latents.query(count)

        def score() -> Tensor:
            return index_scores(query, weights, self._keys, rows, CONTEXT, None, False)

        def attend(selected: Tensor) -> Tensor:
            return latent_attention.attend_latents(
                latent_query, self._latents.fp8, latent_rows, selected, 512, SCALE, CONTEXT
            )

        scores = [score() for _ in range(ROUNDS)]
        chosen = [self._latents.selected(count) for _ in range(ROUNDS)]
        return {
            "index scores": graph_us([score] * ROUNDS),
            "selection": graph_us([lambda s=s: select(s, rows, SELECTED) for s in scores]),  # type: ignore[misc]
            "attention": graph_us([lambda c=c: attend(c) for c in chosen]),  # type: ignore[misc]
            "together": graph_us([lambda: attend(select(score(), rows, SELECTED))] * ROUNDS),
        }

    def chunk(self) -> dict[str, float]:
        """Microseconds of the scores and the selection of the last rows of one prompt."""
        numbers = torch.arange(CHUNK, device=DEVICE, dtype=torch.int32)
        rows = Rows(
            torch.zeros_like(numbers),
            CONTEXT - CHUNK + numbers,
            torch.full_like(numbers, SELECTED),
            self._table[:1].contiguous(),
        )
        query, weights = self._index_queries(CHUNK)

        def score() -> Tensor:
            return index_scores(query, weights, self._keys, rows, CONTEXT, None, False)

        return {
            "index scores": graph_us([score]),
            "together": graph_us([lambda: select(score(), rows, SELECTED)]),
        }

    def _index_queries(self, count: int) -> tuple[Tensor, Tensor]:
        query = torch.randn(count, HEADS, DIM, device=DEVICE).to(torch.float8_e4m3fn)
        return query, torch.randn(count, HEADS, device=DEVICE)


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description="the three kernels of a sparse decode on a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON file to write")
    parser.add_argument("--vendor", choices=("on", "off"), default="off")
    chosen = parser.parse_args()
    latent_attention.VENDOR = chosen.vendor == "on"
    bench = Bench()
    found = {
        "device": torch.cuda.get_device_name(),
        "vendor": chosen.vendor,
        **{f"decode of {count}": bench.decode(count) for count in (16, MOST)},
        f"chunk of {CHUNK}": bench.chunk(),
    }
    print(json.dumps(found, indent=1))
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    name = "sparse_decode_vendor.json" if latent_attention.VENDOR else "sparse_decode.json"
    (out / name).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
