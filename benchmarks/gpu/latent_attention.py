"""Absorbed latent attention on a GPU: checked against float64 first, then timed in replayed CUDA graphs.

`python -m benchmarks.gpu.latent_attention --out latent_attention.json` prints a line a case: microseconds a call, of calls
with other queries and selections that follow one another in a graph, medians of 20 replays. Contexts are 131,072 tokens in
random pages, scales are no powers of two, heads are 128 of rank 512 with a shared key of 64, and sparse rows select 2,048.
`--roles off` takes the form without roles; `--vendor on` lets trials choose FlashMLA's kernel for sparse rows, if it is
installed, and says what they chose; `--tokens` shortens the contexts for a small GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import PAGE_SIZE
from engine.kernels.triton import latent_attention
from engine.kernels.triton.latent_attention import attend_latents
from engine.kernels.triton.rows import Rows
from engine.memory.layouts import LatentLayout

LAYOUT = LatentLayout(512, 64)
HEADS = 128
TOP_K = 2048
SCALE = 0.07
REQUESTS = 16  # contexts that lie in the cache; rows beyond them share
CALLS = 4  # in a graph
TOLERANCE = 5e-3
CHUNK = 1 << 20


def main() -> None:
    """Check and time every case."""
    parser = argparse.ArgumentParser(description="absorbed latent attention on a GPU")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--roles", choices=("on", "off"), default="on")
    parser.add_argument("--vendor", choices=("on", "off"), default="off")
    parser.add_argument("--tokens", type=int, default=131_072, help="of a context")
    chosen = parser.parse_args()
    latent_attention.ROLES = chosen.roles == "on"
    latent_attention.VENDOR = chosen.vendor == "on"
    logging.basicConfig(level=logging.INFO if latent_attention.VENDOR else logging.WARNING)
    bench = Bench(chosen.tokens)
    found: dict[str, float | str] = {
        "device": torch.cuda.get_device_name(),
        "error, fp8": bench.error(bench.fp8),
        "error, bf16": bench.error(bench.bf16),
    }
    for name in ("error, fp8", "error, bf16"):
        error = found[name]
        assert isinstance(error, float)
        if not error < TOLERANCE:
            raise SystemExit(f"{name} is {error:.2g}: the kernel is wrong, so no time is taken")
    for count in (1, 16, 64):
        found[f"sparse, fp8, {count} rows"] = bench.sparse(bench.fp8, count)
        found[f"sparse, bf16, {count} rows"] = bench.sparse(bench.bf16, count)
    found["sparse, fp8, 512 rows of a prompt"] = bench.prompt(512)
    for count in (1, 16):
        found[f"dense, fp8, {count} rows"] = bench.dense(count)
    for name, value in found.items():
        print(f"{name:36} {value if isinstance(value, str) else f'{value:.4g}'}")
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


class Bench:
    """Planes of latents, and what is asked of them."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._device = torch.device("cuda")
        torch.manual_seed(0)
        pages = REQUESTS * tokens // PAGE_SIZE
        self.fp8 = torch.empty(pages, PAGE_SIZE, LAYOUT.token_bytes, dtype=torch.uint8, device=self._device)
        flat = self.fp8.view(-1, LAYOUT.token_bytes)
        for part in flat.split(CHUNK):
            values = self._random(len(part), 512).to(torch.float8_e4m3fn)
            scales = torch.rand(len(part), 4, device=self._device) + 0.5
            part.copy_(LAYOUT.pack(values, scales, self._random(len(part), 64)))
        self.bf16 = torch.empty(pages, PAGE_SIZE, 576, dtype=torch.bfloat16, device=self._device)
        for part in self.bf16.view(-1, 576).split(CHUNK):
            part.normal_()
        self._table = torch.randperm(pages, device=self._device).int().view(REQUESTS, -1)

    def error(self, plane: Tensor) -> float:
        """The largest relative error of a row: sparse and dense, long and short, positions left out, padding."""
        ends = [self._tokens - 1, 4000, 100, 0, -1, self._tokens - 1, 70]
        rows = self.rows(len(ends))
        rows.positions.copy_(torch.tensor(ends))
        rows.index_top_k[5:] = 0
        selected = torch.full((len(ends), TOP_K), -1, dtype=torch.int32, device=self._device)
        for row, end in enumerate(ends[:5]):
            chosen = torch.randperm(end + 1, device=self._device)[:TOP_K].sort().values
            selected[row, : len(chosen)] = chosen.int()
        selected[1, ::3] = -1
        query = self.query(len(ends))
        out = attend_latents(query, plane, rows, selected, 512, SCALE, self._tokens)
        worst = float(out[4].abs().max())
        for row, end in enumerate(ends):
            if end < 0:
                continue
            at = torch.arange(end + 1, device=self._device) if row > 4 else selected[row]
            at = at[at >= 0].long()
            page = self._table[int(rows.request[row])].long()[at // PAGE_SIZE]
            read = plane[page, at % PAGE_SIZE]
            own = LAYOUT.unpack(read, torch.float64) if plane.dtype == torch.uint8 else read.to(torch.float64)
            wanted = (query[row].double() @ own.T * SCALE).softmax(-1) @ own[:, :512]
            worst = max(worst, float((out[row].double() - wanted).norm() / wanted.norm()))
        return worst

    def sparse(self, plane: Tensor, count: int) -> float:
        """Decodes of `count` rows."""
        return self._time(plane, self.rows(count), [self.selected(count) for _ in range(CALLS)])

    def prompt(self, count: int) -> float:
        """The last `count` rows of a prompt."""
        rows = self.rows(count)
        rows.request.zero_()
        rows.positions.copy_(torch.arange(self._tokens - count, self._tokens))
        selected = self.selected(64, self._tokens - count).repeat(count // 64, 1)
        return self._time(self.fp8, rows, [selected])

    def dense(self, count: int) -> float:
        """Decodes of `count` rows that read everything."""
        return self._time(self.fp8, self.rows(count, 0), [None])

    def _time(self, plane: Tensor, rows: Rows, selections: Sequence[Tensor | None]) -> float:
        queries = [self.query(len(rows.positions)) for _ in selections]

        def all_of_them() -> None:
            for query, selected in zip(queries, selections, strict=True):
                attend_latents(query, plane, rows, selected, 512, SCALE, self._tokens)

        return _microseconds(all_of_them) / len(selections)

    def rows(self, count: int, top_k: int = TOP_K) -> Rows:
        """Decodes at the contexts' ends."""
        each: dict[str, Any] = {"dtype": torch.int32, "device": self._device}
        request = torch.arange(count, **each) % REQUESTS
        ends = torch.full((count,), self._tokens - 1, **each)
        return Rows(request, ends, torch.full((count,), top_k, **each), self._table)

    def selected(self, count: int, below: int = 0) -> Tensor:
        """Random selections, ascending: [count, 2048] int32."""
        drawn = torch.rand(count, below or self._tokens, device=self._device)
        return drawn.topk(TOP_K).indices.sort().values.int()

    def query(self, count: int) -> Tensor:
        """Random queries: [count, 128, 576] bfloat16."""
        return (self._random(count, HEADS, 576) * 0.3).to(torch.bfloat16)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._device)


def _microseconds(call: Callable[[], None]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times: list[float] = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
