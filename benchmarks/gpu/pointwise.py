"""The pointwise kernels of a step and sampling, each against its floor and plain torch, in replayed CUDA graphs.

`python -m benchmarks.gpu.pointwise --out pointwise.json` prints a table. Times are medians, microseconds a call, of calls
that follow one another in a graph. The floor is the bytes that must move over the machine's own copy rate. At few rows
that is far below what any launch takes, so `nothing` is there to compare with: a kernel that writes one number.

Kernels are compiled beforehand by several processes (`--compile PART` is one of those). More than 400 lines: it is one list
of cases, and each is a few lines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.indexer import KEY_NORM_EPS, IndexQueries
from engine.attention.precision import IndexFormat
from engine.kernels.torchops.attention import VectorisedKernels
from engine.kernels.triton import index_key, product
from engine.kernels.triton.gate import silu_times
from engine.kernels.triton.low_rank import Correction, add_low_rank
from engine.kernels.triton.norm import add_rms_norm
from engine.kernels.triton.rotation import rotate_and_store
from engine.kernels.triton.sampling import DrawRows, Draws, Needs, draw
from engine.layers.norm import layer_norm, rms_norm
from engine.layers.rope import RotaryTable, rotate
from engine.plan.types import SampleSpec
from engine.protocol import SamplingParams
from engine.step.device_sampler import needs_of, rows_of
from engine.step.sampler import sample

ROOT = Path(__file__).parents[2]
EPS = 1e-5
CALLS = 20  # in a graph
PAGES = 1024
ROWS = (1, 64, 256, 512)
DTYPE = torch.bfloat16


class Shape(NamedTuple):
    """A model's."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    index_heads: int = 8
    index_dim: int = 64
    index_rope: int = 32
    rank: int = 32


SHAPES = (
    Shape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152),
    Shape("Qwen2.5-1.5B", 1536, 8960, 12, 2, 128, 151936),
)


class Case(NamedTuple):
    """One operation at one size."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any] | None
    num_bytes: float  # that must move


def made(*shape: int) -> Tensor:
    """Random numbers of the model's dtype."""
    return torch.randn(*shape, device="cuda").to(DTYPE)


class Place(NamedTuple):
    """Where rows are and go."""

    positions: Tensor
    pages: Tensor
    offsets: Tensor


def place(rows: int) -> Place:
    """Rows at random places."""
    slots = torch.randperm(PAGES * 64, device="cuda")[:rows]
    return Place(torch.randint(0, 8192, (rows,), device="cuda"), slots // 64, slots % 64)


def layer_cases(shape: Shape, rows: int) -> Iterator[Case]:
    """What a layer does beside its products and its attention."""
    s, at = shape, place(rows)
    x, update, weight = made(rows, s.hidden), made(rows, s.hidden), made(s.hidden)

    def plain_norm() -> Tensor:
        return rms_norm(x + update, weight, EPS)

    yield Case("norm", lambda: add_rms_norm(x, update, weight, EPS), plain_norm, 8 * rows * s.hidden)

    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    sums, bias = made(rows, width), made(width)
    rotary = RotaryTable(s.head_dim, 1e4, 8192, device=torch.device("cuda"))
    plane = torch.zeros(PAGES, 64, s.kv_heads, 2, s.head_dim, dtype=DTYPE, device="cuda")

    def rotation() -> Tensor:
        return rotate_and_store(sums, at.positions, at.pages, at.offsets, rotary.all(), plane, bias=bias)

    def plain_rotation() -> Tensor:
        heads = (sums + bias).view(rows, -1, s.head_dim)
        query, key, value = heads.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        turns = rotary.at(at.positions)
        query, key = rotate(query, turns), rotate(key, turns)
        plane[at.pages, at.offsets] = torch.stack((key, value), dim=2)
        return query

    yield Case("rotation", rotation, plain_rotation, rows * (4 * width + 4 * s.head_dim))

    gated = made(rows, 2 * s.intermediate)

    def plain_gate() -> Tensor:
        gate, up = gated.chunk(2, dim=-1)
        return F.silu(gate) * up

    yield Case("gate", lambda: silu_times(gated), plain_gate, 6 * rows * s.intermediate)

    short, up = made(rows, s.rank), made(width, s.rank)
    fix = Correction(short, up, torch.ones(rows, dtype=torch.bool, device="cuda"))
    num_bytes = 2 * (rows * (s.rank + 2 * width) + s.rank * width)
    yield Case("low rank", lambda: add_low_rank(sums, fix), lambda: sums + F.linear(short, up), num_bytes)

    yield from product_cases(shape, rows)


def product_cases(shape: Shape, rows: int) -> Iterator[Case]:
    """Products of few rows, as a layer has them; torch's beside them."""
    s = shape
    width = (s.heads + 2 * s.kv_heads) * s.head_dim + s.index_heads * (s.index_dim + 1) + s.index_dim + s.rank
    for name, inputs, outputs in (
        ("q, k, v and index", s.hidden, width),
        ("o", s.heads * s.head_dim, s.hidden + s.rank),
        ("down", s.intermediate, s.hidden),
    ):
        x, weight = made(rows, inputs), made(outputs, inputs)
        if product.fits(rows, weight):
            yield Case(
                f"product {name}",
                lambda x=x, weight=weight: product.linear(x, weight),  # type: ignore[misc]
                lambda x=x, weight=weight: F.linear(x, weight),  # type: ignore[misc]
                2 * outputs * inputs,
            )
    x, weight = made(rows, s.hidden), made(2 * s.intermediate, s.hidden)
    if product.fits(rows, weight):
        yield Case(
            "product gate and up",
            lambda: product.gated_linear(x, weight),
            lambda: silu_times(F.linear(x, weight)),
            2 * len(weight) * s.hidden,
        )


def index_cases(shape: Shape, rows: int) -> Iterator[Case]:
    """Index keys and queries, in each form."""
    s, at, kernels = shape, place(rows), VectorisedKernels()
    heads = s.index_heads
    dim = s.index_dim
    key, query, head_weights = made(rows, dim), made(rows, heads * dim), made(rows, heads).float()
    weight, bias = made(dim), made(dim)
    rotary = RotaryTable(s.index_rope, 1e4, 8192, device=torch.device("cuda"))
    scale = heads**-0.5 * dim**-0.5
    forms: tuple[index_key.KeyForm, ...] = ("plain", "int8", "fp8")
    for form in forms:
        dtype, width = (DTYPE, dim) if form == "plain" else (torch.uint8, dim + 4)
        plane = torch.zeros(PAGES, 64, width, dtype=dtype, device="cuda")
        kept = IndexFormat(dim, DTYPE if form == "plain" else "fp8")

        def store(plane: Tensor = plane, form: index_key.KeyForm = form) -> None:
            index_key.store_keys(
                key, weight, bias, KEY_NORM_EPS, rotary.all(), at.positions, at.pages, at.offsets, plane, form
            )

        def plain_store(
            plane: Tensor = plane, form: index_key.KeyForm = form, kept: IndexFormat = kept
        ) -> None:
            normed = layer_norm(key, weight, bias, KEY_NORM_EPS)
            turned = rotate(normed.unsqueeze(1), rotary.at(at.positions)).squeeze(1)
            if form == "int8":
                kernels.store_index_keys(plane, at.pages, at.offsets, turned)
            else:
                kept.write(plane, at.pages, at.offsets, turned, kernels)

        def queries(form: index_key.KeyForm = form) -> tuple[Tensor, Tensor]:
            return index_key.queries(query, head_weights, scale, rotary.all(), at.positions, form)

        def plain_queries(kept: IndexFormat = kept) -> IndexQueries:
            turned = rotate(query.view(rows, heads, dim), rotary.at(at.positions))
            return kept.queries(IndexQueries(query=turned, head_weights=head_weights * scale), kernels)

        size = 2 if form == "plain" else 1
        yield Case(f"index keys, {form}", store, plain_store, rows * dim * (2 + size))
        yield Case(
            f"index queries, {form}",
            queries,
            None if form == "int8" else plain_queries,
            rows * heads * dim * (2 + size),
        )


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "presence penalty": {"presence_penalty": 0.5},
    "5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def peaked(rows: int, vocab: int) -> Tensor:
    """Logits with a few dozens of likely tokens, as a language model's are."""
    logits = torch.randn(rows, vocab, device="cuda") * 2
    ids = torch.randint(0, vocab, (rows, 60), device="cuda")
    heights = 22 - 3 * torch.arange(1, 61, device="cuda").log() + torch.randn(rows, 60, device="cuda")
    return logits.scatter_(1, ids, heights)


def spec(index: int, params: dict[str, Any]) -> SampleSpec:
    """A request's wish, somewhere in its text."""
    return SampleSpec(
        params=SamplingParams(max_tokens=1, seed=index, **params),
        output_index=index,
        prompt_len=1,
        history=(1,),
    )


def sampling_cases(shape: Shape, rows: int, logits: Tensor, kind: str) -> Iterator[Case]:
    """Each way to sample, all rows alike."""
    history = torch.zeros(rows, shape.vocab, dtype=torch.int32, device="cuda")
    for name, params in SAMPLING.items():
        if kind == "flat" and "top" not in name and name != "temperature":
            continue
        specs = [spec(i, params) for i in range(rows)]
        chosen = rows_of(specs, range(rows), history, torch.device("cuda"))
        needs = needs_of(specs)

        def ours(chosen: DrawRows = chosen, needs: Needs = needs) -> Draws:
            return draw(logits, chosen, needs)

        plain = (lambda: logits.argmax(-1)) if name == "greedy" else None
        yield Case(f"sample, {kind}, {name}", ours, plain, 4 * rows * shape.vocab)


def cases(shape: Shape, rows: int, parts: str) -> Iterator[Case]:
    """All of some parts: l(ayer), i(ndex), s(ampling)."""
    if "l" in parts:
        yield from layer_cases(shape, rows)
    if "i" in parts:
        yield from index_cases(shape, rows)
    if "s" in parts:
        yield from sampling_cases(shape, rows, peaked(rows, shape.vocab), "peaked")
        if rows <= 64:
            flat = torch.randn(rows, shape.vocab, device="cuda")
            yield from sampling_cases(shape, rows, flat, "flat")


def graphed(call: Callable[[], Any], calls: int = CALLS, replays: int = 15) -> float:
    """Median microseconds of a call, of `calls` in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times: list[float] = []
    for turn in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second, read and written together, of a large copy (by a kernel, which a copy in a graph is not)."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / graphed(lambda: torch.neg(source, out=target), calls=4, replays=8) * 1e6


def tokens_agree(shape: Shape, rows: int) -> dict[str, int]:
    """Of so many rows and ways to sample, how many tokens are not the CPU's: none, but for near ties."""
    result = {"drawn": 0, "different": 0}
    for logits in (peaked(rows, shape.vocab), torch.randn(rows, shape.vocab, device="cuda")):
        ways = [params for params in SAMPLING.values() if "logprobs" not in params]
        specs = [spec(i, ways[i % len(ways)]) for i in range(rows)]
        history = torch.zeros(rows, shape.vocab, dtype=torch.int32, device="cuda")
        history[:, 1] = 1
        chosen = rows_of(specs, range(rows), history, torch.device("cuda"))
        ours = draw(logits, chosen, needs_of(specs)).tokens.tolist()
        theirs = [one.token_id for one in sample(logits.cpu(), specs)]
        result["drawn"] += rows
        result["different"] += sum(one != other for one, other in zip(ours, theirs, strict=True))
    return result


def compile_all() -> float:
    """Seconds to compile every kernel, in a process a part."""
    begin = time.perf_counter()
    parts = [(i, part) for i in range(len(SHAPES)) for part in "lis"]
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.gpu.pointwise", "--compile", f"{i}{part}"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for i, part in parts
    ]
    for worker in workers:
        if worker.wait():
            raise SystemExit("a kernel does not compile")
    return time.perf_counter() - begin


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("pointwise.json"), help="where the figures go")
    parser.add_argument("--compile", metavar="PART", help="only compile: a model's number and l, i or s")
    arguments = parser.parse_args()
    if arguments.compile:
        for rows in (1, 64):
            for case in cases(SHAPES[int(arguments.compile[0])], rows, arguments.compile[1]):
                case.ours()
        torch.cuda.synchronize()
        return
    torch.manual_seed(0)
    seconds = compile_all()
    rate = copy_rate()
    one = torch.zeros(1, device="cuda")
    nothing = graphed(lambda: one.zero_())
    print(f"compiled in {seconds:.0f} s; copies at {rate / 1e12:.2f} TB/s; nothing {nothing:.2f} us")
    found: list[dict[str, Any]] = []
    for shape in SHAPES:
        for rows in ROWS:
            for case in cases(shape, rows, "lis"):
                slow = "flat" in case.name or rows * shape.vocab > 1 << 24
                calls = 4 if slow and "sample" in case.name else CALLS
                ours = graphed(case.ours, calls)
                plain = None if case.plain is None else graphed(case.plain, calls)
                found.append({
                    "model": shape.name, "rows": rows, "operation": case.name, "us": ours, "torch_us": plain,
                    "floor_us": case.num_bytes / rate * 1e6,
                })  # fmt: skip
            torch.cuda.empty_cache()
    agreement = {shape.name: tokens_agree(shape, 96) for shape in SHAPES}
    report = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_a_second": rate,
        "nothing_us": nothing, "compile_seconds": seconds, "operations": found, "tokens_against_the_cpu": agreement,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print_table(found)
    print(agreement)


def print_table(found: list[dict[str, Any]]) -> None:
    """Ours / torch / floor, microseconds, by rows."""
    print(f"{'model':14}{'operation':36}" + "".join(f"{f'{rows} rows':>22}" for rows in ROWS))
    for model, name in dict.fromkeys((one["model"], one["operation"]) for one in found):
        own = {one["rows"]: one for one in found if (one["model"], one["operation"]) == (model, name)}
        line = ""
        for rows in ROWS:
            if rows not in own:
                line += f"{'':>22}"
                continue
            one = own[rows]
            plain = math.nan if one["torch_us"] is None else one["torch_us"]
            line += f"{one['us']:8.1f}/{plain:6.1f}/{one['floor_us']:6.1f}"
        print(f"{model:14}{name:36}{line}")


if __name__ == "__main__":
    main()
