"""The Triton kernels on one GPU: conformance, then each against its floor and against plain torch.

    python -m benchmarks.gpu.kernels [--out DIR] [--only TEXT] [--no-conformance]

Times are microseconds a call: medians of a replayed CUDA graph over operands that rotate, so that they do not sit in the L2
cache. A floor is the larger of the bytes that must move over the read ceiling and the products over the matrix ceiling of
one H200 (`log.md` says how these were measured). Plain torch works on contiguous copies that were gathered beforehand.
More than 400 lines: it is one list of cases, and each is a few lines.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from engine.kernels.triton import attention, scores, select
from engine.kernels.triton.rows import Blocks, Rows, Span, blocks_of
from engine.memory.layouts import Int8KeyLayout

READ = 4.46e12  # bytes a second
PRODUCTS = 794e12  # bf16 operations a second
CACHE = 200e6  # bytes between two uses of one operand; L2 has 60 MB
PAGE = 64
CUDA = torch.device("cuda")
TESTS = "tests/engine/kernels/triton"


@dataclass(frozen=True)
class Shape:
    """A model's heads."""

    name: str
    kv_heads: int
    group: int
    dim: int
    index_heads: int
    index_dim: int
    top_k: int


SMOL = Shape("SmolLM2-135M", 3, 3, 64, 8, 64, 256)
QWEN = Shape("Qwen2.5-Coder-1.5B", 2, 6, 128, 8, 64, 2048)


@dataclass
class Work:
    """A case made ready: calls over operands that rotate, what a call must do, and the same in torch."""

    calls: list[Callable[[], object]]
    bytes: float
    flops: float
    plain: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """What is measured, and how to make it ready."""

    name: str
    make: Callable[[], Work] = field(repr=False)


@dataclass
class Figure:
    """What a case took."""

    name: str
    us: float
    low: float
    high: float
    floor: float
    plain: float | None

    def line(self) -> str:
        """One line of the table."""
        plain = f"{self.plain:10.1f}" if self.plain is not None else " " * 10
        return f"{self.name:62} {self.us:9.1f} {self.floor:8.1f} {self.us / self.floor:7.2f} {plain}"


HEAD = f"{'case':62} {'us':>9} {'floor':>8} {'ratio':>7} {'torch':>10}"


def _on_device(request: Tensor, positions: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of `Rows`."""
    return request.int().to(CUDA), positions.int().to(CUDA), top_k.int().to(CUDA)


class Data:
    """Rows over a paged cache, several sets of them apart from one another."""

    def __init__(self, rows: int, context: int, top_k: int, set_bytes: float, prompt: bool) -> None:
        """A prompt's last `rows` positions, or `rows` decodes, of this many positions each."""
        self.pages = -(-context // PAGE)
        requests = 1 if prompt else rows
        self.sets = max(1, min(24, math.ceil(CACHE / max(set_bytes, 1))))
        self.num_pages = requests * self.pages * self.sets
        self.generator = torch.Generator(CUDA).manual_seed(rows * context)
        order = torch.randperm(self.num_pages, device=CUDA, generator=self.generator).int()
        tables = order.view(self.sets, requests, self.pages)
        ends = torch.arange(context - rows, context) if prompt else torch.full((rows,), context - 1)
        request = torch.zeros(rows) if prompt else torch.arange(rows)
        vectors = _on_device(request, ends, torch.full((rows,), top_k))
        self.rows = [Rows(*vectors, table) for table in tables]
        self.first = context - rows

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Numbers of a normal distribution."""
        return torch.randn(*shape, device=CUDA, generator=self.generator, dtype=torch.float32).to(dtype)

    def plane(self, *shape: int) -> Tensor:
        """[num_pages, 64, *shape] bf16, made in pieces: all of it in float32 would be large."""
        plane = torch.empty(self.num_pages, PAGE, *shape, device=CUDA, dtype=torch.bfloat16)
        plane.flatten().normal_(generator=self.generator)
        return plane

    def blocks(self, prompt: bool, size: int) -> Blocks | None:
        """The whole prompt in blocks."""
        count = len(self.rows[0])
        return blocks_of([Span(0, count, self.first)], count, size, CUDA) if prompt else None


def seen(rows: int, context: int, prompt: bool) -> int:
    """Pairs of (row, position)."""
    return rows * context - (rows * (rows - 1) // 2 if prompt else 0)


def attention_case(
    shape: Shape, rows: int, context: int, sparse: bool, prompt: bool = False, plain: bool = False
) -> Case:
    """Dense or sparse attention."""
    heads = shape.kv_heads * shape.group

    def make() -> Work:
        token = shape.kv_heads * 2 * shape.dim * 2
        top_k = shape.top_k if sparse else 0
        pairs = rows * shape.top_k if sparse else seen(rows, context, prompt)
        read = min(pairs, context) * token if prompt else pairs * token
        data = Data(rows, context, top_k, (context if prompt else rows * context) * token, prompt)
        plane = data.plane(shape.kv_heads, 2, shape.dim)
        query = data.random(rows, shape.kv_heads, shape.group, shape.dim)
        selected = None
        if sparse:
            drawn = [torch.randperm(context - rows, device=CUDA)[: shape.top_k] for _ in range(min(rows, 64))]
            chosen = torch.stack(drawn).sort().values
            selected = chosen.repeat(-(-rows // 64), 1)[:rows].int().contiguous()
        blocks = data.blocks(prompt, attention.block_rows(shape.group))

        def call(one: Rows) -> Callable[[], object]:
            return lambda: attention.attend(query, plane, one, selected, shape.dim**-0.5, context, blocks)

        moved = read + query.numel() * 4 + (selected.numel() * 4 if selected is not None else 0)
        work = Work([call(one) for one in data.rows], moved, 4 * pairs * heads * shape.dim)
        if plain and not sparse:
            table = data.rows[0].block_table.long()
            kv = plane[table].flatten(1, 2).permute(3, 0, 2, 1, 4)  # [2, R, Hkv, C, D]
            keys, values = kv[0].contiguous(), kv[1].contiguous()
            if prompt:
                own = query.flatten(1, 2).transpose(0, 1)[None].contiguous()
                mask = torch.ones(rows, context, device=CUDA, dtype=torch.bool).tril(context - rows)
                work.plain = lambda: F.scaled_dot_product_attention(own, keys, values, mask, enable_gqa=True)
            else:
                own = query.flatten(1, 2)[:, :, None].contiguous()
                work.plain = lambda: F.scaled_dot_product_attention(own, keys, values, enable_gqa=True)
        return work

    kind = f"sparse {shape.top_k}" if sparse else "dense"
    return Case(f"{shape.name} attention {kind} {_batch(rows, context, prompt)}", make)


def scores_case(
    shape: Shape, rows: int, context: int, layout: str, prompt: bool = False, plain: bool = False
) -> Case:
    """Index scores."""
    heads, dim = shape.index_heads, shape.index_dim

    def make() -> Work:
        token = dim * 2 if layout == "bf16" else dim + 4
        pairs = seen(rows, context, prompt)
        read = (context if prompt else pairs) * token
        data = Data(rows, context, shape.top_k, (context if prompt else rows * context) * token, prompt)
        query, weights = data.random(rows, heads, dim), data.random(rows, heads, dtype=torch.float32)
        if layout == "bf16":
            plane = data.plane(dim)
        else:
            plane = torch.randint(1, 256, (data.num_pages, PAGE * (dim + 4)), device=CUDA, dtype=torch.uint8)
            if layout == "fp8":
                numbers = torch.randn(1 << 20, device=CUDA).mul(60).to(torch.float8_e4m3fn).view(torch.uint8)
                plane[:, : PAGE * dim].view(-1, PAGE * dim)[:] = numbers.view(-1, PAGE * dim)[
                    torch.arange(data.num_pages, device=CUDA) % ((1 << 20) // (PAGE * dim))
                ]
                query = query.mul(60).to(torch.float8_e4m3fn)
            scales = torch.rand(data.num_pages, PAGE, device=CUDA) * 0.02 + 0.001
            plane[:, PAGE * dim :] = scales.view(torch.uint8)
            plane = plane.view(data.num_pages, PAGE, dim + 4)
        blocks = data.blocks(prompt, scores.block_rows(heads))

        def call(one: Rows) -> Callable[[], object]:
            return lambda: scores.index_scores(query, weights, plane, one, context, blocks, fill=False)

        work = Work([call(one) for one in data.rows], read + pairs * 4, 2 * pairs * heads * dim)
        if plain and layout == "int8":
            numbers, scale = Int8KeyLayout(dim).read(plane, data.rows[0].block_table.long())
            keys = (numbers * scale.unsqueeze(-1)).flatten(1, 2).bfloat16()  # [R, C, d]

            def torch_scores() -> Tensor:
                own = query.flatten(0, 1)[None] if prompt else query
                products = torch.relu(own @ keys.transpose(1, 2)).view(rows, heads, -1)
                return torch.einsum("thc,th->tc", products, weights.bfloat16())

            work.plain = torch_scores
        return work

    return Case(f"{shape.name} scores {layout} {heads}x{dim} {_batch(rows, context, prompt)}", make)


def select_case(top_k: int, rows: int, context: int, prompt: bool = False, plain: bool = False) -> Case:
    """The exact top-k."""

    def make() -> Work:
        sets = max(1, min(24, math.ceil(CACHE / (rows * context * 4))))
        given = [torch.randn(rows, context, device=CUDA) for _ in range(sets)]
        ends = torch.arange(context - rows, context) if prompt else torch.full((rows,), context - 1)
        vectors = _on_device(torch.zeros(rows), ends, torch.full((rows,), top_k))
        batch = Rows(*vectors, torch.zeros(1, 1, dtype=torch.int32, device=CUDA))

        def call(one: Tensor) -> Callable[[], object]:
            return lambda: select.select(one, batch, top_k)

        moved = seen(rows, context, prompt) * 4 + rows * top_k * 4
        return Work(
            [call(one) for one in given], moved, 0, (lambda: torch.topk(given[0], top_k)) if plain else None
        )

    return Case(f"top-{top_k} {_batch(rows, context, prompt)}", make)


def _batch(rows: int, context: int, prompt: bool) -> str:
    return f"{'prompt' if prompt else 'decode'} {rows} x {context}"


def cases() -> Iterator[Case]:
    """All of them."""
    for context in (128, 1024, 2048, 7168):
        for rows in (1, 8, 64, 256):
            plain = rows in (1, 64)
            yield attention_case(SMOL, rows, context, False, plain=plain)
            if context > SMOL.top_k:
                yield scores_case(SMOL, rows, context, "int8", plain=plain)
                yield select_case(SMOL.top_k, rows, context, plain=plain)
                yield attention_case(SMOL, rows, context, True)
    for rows in (512, 2048):
        yield attention_case(SMOL, rows, 7168, False, True, plain=True)
        yield scores_case(SMOL, rows, 7168, "int8", True, plain=True)
        yield select_case(SMOL.top_k, rows, 7168, True, plain=True)
        yield attention_case(SMOL, rows, 7168, True, True)
    yield scores_case(SMOL, 64, 7168, "bf16")
    yield scores_case(SMOL, 2048, 7168, "bf16", True)
    yield attention_case(SMOL, 7168, 7168, False, True)
    for context in (8192, 30720):
        for rows in (1, 32):
            yield attention_case(QWEN, rows, context, False, plain=True)
            yield scores_case(QWEN, rows, context, "int8")
            yield select_case(QWEN.top_k, rows, context, plain=True)
            yield attention_case(QWEN, rows, context, True)
    yield attention_case(QWEN, 2048, 30720, False, True, plain=True)
    yield scores_case(QWEN, 2048, 30720, "int8", True)
    yield select_case(QWEN.top_k, 2048, 30720, True, plain=True)
    yield attention_case(QWEN, 2048, 30720, True, True)
    v32 = Shape("DeepSeek-V3.2", 1, 1, 64, 64, 128, 2048)
    for rows in (16, 64):
        yield scores_case(v32, rows, 131072, "fp8")
        yield select_case(2048, rows, 131072, plain=True)
    yield select_case(2048, 1, 1048576, plain=True)
    yield select_case(2048, 8, 1048576)


def timed(calls: list[Callable[[], object]], inner: int = 24, repeats: int = 9) -> tuple[float, float, float]:
    """Median, least and most microseconds a call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    inner = max(inner, len(calls))
    with torch.cuda.graph(graph):
        for i in range(inner):
            calls[i % len(calls)]()
    graph.replay()
    taken = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / inner)
    return statistics.median(taken), min(taken), max(taken)


def measure(case: Case) -> Figure:
    """One case, made ready here and forgotten afterwards."""
    work = case.make()
    few = 4 if work.flops / PRODUCTS > 2e-4 or work.bytes / READ > 2e-4 else 24
    us, low, high = timed(work.calls, few)
    plain = timed([work.plain], 4, 5)[0] if work.plain is not None else None
    floor = max(work.bytes / READ, work.flops / PRODUCTS) * 1e6
    return Figure(case.name, us, low, high, floor, plain)


def _compile(index: int, only: str) -> str:
    """Run one case once in a process of its own, so that its kernels are in Triton's cache."""
    case = [one for one in cases() if only in one.name][index]
    try:
        work = case.make()
        work.calls[0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{case.name}: {error}"
    return ""


def warm(only: str, processes: int) -> None:
    """Compile in parallel what the cases need."""
    count = sum(only in one.name for one in cases())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        for failure in pool.map(_compile, range(count), [only] * count):
            if failure:
                print("failed:", failure, flush=True)


def conformance(out: Path) -> int:
    """The kernels' tests on this device; what they print goes to a file."""
    command = [sys.executable, "-P", "-m", "pytest", "-o", "pythonpath=.", TESTS, "--confcutdir", TESTS]
    command += [
        "-q",
        "-p",
        "no:cacheprovider",
        "-ra",
        "--import-mode=importlib",
        "-c",
        os.devnull,
        "--rootdir",
        ".",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (out / "conformance.txt").write_text(done.stdout + done.stderr)
    print("\n".join(done.stdout.splitlines()[-12:]), flush=True)
    return done.returncode


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--no-conformance", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    verdict = "not asked"
    if not options.no_conformance:
        verdict = "failed" if conformance(options.out) else "passed"
    print(f"conformance: {verdict}, {time.monotonic() - start:.0f} s", flush=True)
    warm(options.only, min(14, os.cpu_count() or 1))
    print(f"compiled, {time.monotonic() - start:.0f} s\n{HEAD}", flush=True)
    about = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(), "conformance": verdict,
        "read_ceiling": READ, "product_ceiling": PRODUCTS,
    }  # fmt: skip
    figures = []
    for case in cases():
        if options.only not in case.name:
            continue
        try:
            figures.append(measure(case))
            print(figures[-1].line(), flush=True)
        except Exception as error:
            print(f"{case.name:62} failed: {error}", flush=True)
        # After each case, so that a run which is stopped has what it measured.
        result = {"about": about, "figures": [asdict(one) for one in figures]}
        (options.out / "kernels.json").write_text(json.dumps(result, indent=1))
    print(f"done, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
