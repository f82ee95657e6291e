"""FP8 products, experts, gate and products by heads on one GPU: checked, then timed beside bytes over bandwidth and torch.

    python -m benchmarks.gpu.experts [--out DIR] [--only TEXT] [--variants]

Times are microseconds a call: medians of a replayed CUDA graph over weights that rotate, so that they do not sit in the L2
cache. A floor is the larger of the bytes that must move at 4.3 TB/s and the products at 1,400 TFLOP/s in FP8 or 794 in bf16
(one H200, measured; see `log.md`). DeepSeek-V3.2's sizes. It has more than 400 lines, as its cases share operands and checks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.triton import experts as experts_module
from engine.kernels.triton.compiling import Compilers
from engine.kernels.triton.experts import ExpertTile, run_experts
from engine.kernels.triton.fp8_product import ProductTile, linear_fp8
from engine.kernels.triton.head_product import absorb, expand_values, expand_values_rows
from engine.kernels.triton.quantise import QuantisedRows, add_rms_norm_rows, quantise_rows
from engine.kernels.triton.routing import route
from engine.kernels.triton.wide_experts import WideTile
from engine.layers import moe
from engine.memory.blocks import BLOCK, E4M3, BlockWeight, num_blocks

BYTES = 4.3e12  # a second
FP8 = 1400e12  # operations a second
BF16 = 794e12
CACHE = 150e6  # bytes between two uses of one operand; L2 has 60 MB
CUDA = torch.device("cuda")

HIDDEN, HEADS, RANK, NOPE, VALUE = 7168, 128, 512, 128, 128
INNER, EXPERTS, CHOSEN = 2048, 256, 8
WEIGHTS = {"q_a|kv_a": (2112, HIDDEN), "q_b": (24576, 1536), "o": (HIDDEN, HEADS * VALUE)}
GATE = moe.MoEConfig(EXPERTS, 1, CHOSEN, 8, 4, True, 2.5, INNER)


@dataclass
class Figure:
    """What a case took."""

    name: str
    us: float
    floor: float
    error: float | None = None

    def line(self) -> str:
        """One line of the table."""
        error = "" if self.error is None else f"{self.error:10.2e}"
        return f"{self.name:64} {self.us:9.1f} {self.floor:8.1f} {self.us / self.floor:7.2f} {error}"


def random_blocks(*shape: int, seed: int = 0) -> BlockWeight:
    """A random weight in FP8 blocks, whose outputs are about 1 for inputs about 1."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    small = torch.randint(0, 0x50, shape, dtype=torch.uint8, device=CUDA, generator=generator)
    small[..., ::2] |= 0x80
    blocks = (*shape[:-2], num_blocks(shape[-2]), num_blocks(shape[-1]))
    scales = torch.rand(blocks, device=CUDA, generator=generator) + 0.5
    return BlockWeight(small.view(E4M3), scales * shape[-1] ** -0.5)


def rows_of(*shape: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random normal numbers."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(shape, device=CUDA, generator=generator).to(dtype)


def exact_product(x: QuantisedRows, weight: BlockWeight) -> Tensor:
    """The definition of `linear_fp8`, summed in float64."""
    total = torch.zeros(len(x), weight.shape[0], dtype=torch.float64, device=CUDA)
    for step in range(len(x.scales)):
        at = slice(step * BLOCK, (step + 1) * BLOCK)
        part = x.values[:, at].double() @ weight.values[:, at].double().T
        spread = weight.scales[:, step].repeat_interleave(BLOCK)[: weight.shape[0]].double()
        total += part * x.scales[step].double()[:, None] * spread
    return total


def exact_experts(
    x: Tensor, chosen: Tensor, shares: Tensor, gate_up: BlockWeight, down: BlockWeight
) -> Tensor:
    """The definition of `run_experts` in FP8, rounded where it rounds, an expert at a time."""
    total = torch.zeros(x.shape, dtype=torch.float64, device=CUDA)
    whole = quantise_rows(x)
    for expert in range(gate_up.shape[0]):
        row, j = (chosen == expert).nonzero(as_tuple=True)
        if len(row):
            own = QuantisedRows(
                whole.values.view(torch.uint8)[row].view(E4M3), whole.scales[:, row], whole.turns, x.dtype
            )
            gate, up = exact_product(own, gate_up[expert]).to(x.dtype).chunk(2, dim=-1)
            made = exact_product(quantise_rows((F.silu(gate) * up).contiguous()), down[expert]).to(x.dtype)
            total.index_add_(0, row, made.double() * shares[row, j].double()[:, None])
    return total


def product_error(
    product: Callable[[QuantisedRows, BlockWeight], Tensor], x: QuantisedRows, weight: BlockWeight
) -> float:
    """`error_of` what multiplies."""
    return error_of(product(x, weight), exact_product(x, weight))


def error_of(ours: Tensor, exact: Tensor) -> float:
    """The deviation of the difference, over that of the numbers."""
    return float((ours.double() - exact.double()).std() / exact.double().std())


def time_of(calls: Sequence[Callable[[], object]], least: float = 0.02) -> float:
    """Microseconds a call: the median of replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times: list[float] = []
        while len(times) < 7 or (sum(times) < least * 1e3 and len(times) < 40):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return statistics.median(times[1:]) * 1e3 / len(calls)


def _copies(size: float) -> int:
    return max(2, min(16, math.ceil(CACHE / size) + 1))


class Bench:
    """Cases, of which each is checked and timed."""

    def __init__(self, only: str, variants: bool) -> None:
        self.only, self.variants, self.figures = only, variants, [Figure("", 0, 1)][:0]
        self.compile_only = False

    def wanted(self, name: str) -> bool:
        """Whether the case was asked for."""
        return self.only in name

    def add(
        self,
        name: str,
        calls: Sequence[Callable[[], object]],
        size: float,
        operations: float = 0.0,
        rate: float = FP8,
        error: Callable[[], float] | None = None,
    ) -> None:
        """Check and time one case; a failure ends nothing but the case."""
        if not self.wanted(name):
            return
        try:
            if self.compile_only:
                calls[0]()
                return
            wrong = error() if error else None
            floor = max(size / BYTES, operations / rate) * 1e6
            figure = Figure(name, time_of(calls), floor, wrong)
            self.figures.append(figure)
            print(figure.line(), flush=True)
        except Exception as problem:
            if not self.compile_only:
                print(f"{name:64} FAILED {type(problem).__name__}: {problem}", flush=True)
                traceback.print_exc(limit=3)

    def products(self, counts: tuple[int, ...]) -> None:
        """Products with weights in FP8 blocks."""
        for name, (outputs, inputs) in WEIGHTS.items():
            if not self.wanted(f"fp8 {name}"):
                continue
            copies = 2 if self.compile_only else _copies(outputs * inputs)
            weights = [random_blocks(outputs, inputs, seed=i) for i in range(copies)]
            for rows in counts:
                x = rows_of(rows, inputs)
                ready = quantise_rows(x)
                size = outputs * inputs + rows * (inputs + 2 * outputs)
                operations = 2.0 * rows * outputs * inputs
                forms: list[ProductTile | None] = [None]
                if self.variants:
                    forms += _tiles(rows, outputs, inputs)
                for form in forms:
                    label = f"fp8 {name} {rows}" + ("" if form is None else f" {tuple(form)}")
                    calls = [partial(linear_fp8, ready, w, tile=form) for w in weights]
                    check = partial(product_error, partial(linear_fp8, tile=form), ready, weights[0])
                    self.add(label, calls, size, operations, error=check)
                self.add(
                    f"fp8 {name} {rows} and quantise",
                    [partial(linear_fp8, x, w) for w in weights],
                    size,
                    operations,
                )
                if not self.compile_only:
                    calls = [partial(scaled_mm, ready, w) for w in weights]
                    check = partial(product_error, scaled_mm, ready, weights[0])
                    self.add(f"fp8 {name} {rows} torch._scaled_mm", calls, size, operations, error=check)

    def experts(self, rows: int, count: int) -> None:
        """Routed experts and the shared one."""
        name = f"experts {rows} x {count}"
        if not self.wanted(name):
            return
        gate_up, down = random_blocks(count, 2 * INNER, HIDDEN), random_blocks(count, HIDDEN, INNER, seed=1)
        shared = random_blocks(2 * INNER, HIDDEN, seed=2), random_blocks(HIDDEN, INNER, seed=3)
        x = rows_of(rows, HIDDEN)
        generator = torch.Generator(CUDA).manual_seed(3)
        chosen = torch.rand(rows, count, device=CUDA, generator=generator).topk(CHOSEN).indices.int()
        shares = torch.rand(rows, CHOSEN, device=CUDA, generator=generator)
        hit = len(chosen.unique()) + 1
        size = hit * 3 * INNER * HIDDEN + rows * HIDDEN * 4
        operations = 2.0 * rows * (CHOSEN + 1) * 3 * INNER * HIDDEN
        forms: list[ExpertTile | WideTile | None] = [None]
        if self.variants:
            forms += _expert_tiles(rows, count)

        def error(form: ExpertTile | WideTile | None) -> float:
            ours = run_experts(x, chosen, shares, gate_up, down, 0, shared, tile=form)
            alone = torch.zeros(rows, 1, dtype=torch.int32, device=CUDA)
            one = [BlockWeight(w.values[None], w.scales[None]) for w in shared]
            wanted = exact_experts(x, chosen, shares, gate_up, down)
            wanted += exact_experts(x, alone, torch.ones(rows, 1, device=CUDA), *one)
            again = run_experts(x, chosen, shares, gate_up, down, 0, shared, tile=form)
            assert torch.equal(ours, again), "not the same bits again"
            return error_of(ours, wanted)

        for form in forms:
            label = name + ("" if form is None else f" {tuple(form)}")
            calls = [partial(run_experts, x, chosen, shares, gate_up, down, 0, shared, tile=form)] * 2
            self.add(
                label,
                calls,
                size,
                operations,
                error=partial(error, form) if form is None or isinstance(form, WideTile) else None,
            )
        if not self.compile_only:
            self.profile(name, calls[0])
        self.add(
            f"{name} sorting alone",
            [lambda: experts_module._sort(chosen, count, 0, True, 16)] * 8,
            rows * CHOSEN * 8,
        )
        plain = rows_of(count, 2 * INNER, HIDDEN), rows_of(count, HIDDEN, INNER)
        if count <= 16:
            calls = [partial(run_experts, x, chosen, shares, *plain)] * 2
            self.add(f"{name} bf16, no shared one", calls, 2 * size, operations, BF16)

    def profile(self, name: str, call: Callable[[], object]) -> None:
        """Print what each launch takes."""
        if not self.wanted(name):
            return
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
        parts = [
            f"{event.key[:24]} {event.device_time_total / event.count:.1f}" for event in seen.key_averages()
        ]
        print("    " + ", ".join(parts), flush=True)

    def gate(self, rows: int) -> None:
        """The choice of experts."""
        copies = 2 if self.compile_only else 16
        gates = [rows_of(EXPERTS, HIDDEN, seed=i, dtype=torch.float32) * HIDDEN**-0.5 for i in range(copies)]
        bias = rows_of(EXPERTS, dtype=torch.float32) * 0.1
        for dtype in (torch.bfloat16, torch.float32):
            x = rows_of(rows, HIDDEN, dtype=dtype)

            def error(x: Tensor = x) -> float:
                """The part of rows whose experts differ from the definition's."""
                ours, _ = route(x, gates[0], bias, GATE)
                theirs, _ = moe.route(x.double(), gates[0], bias, GATE)
                return float((ours != theirs).any(1).double().mean())

            calls = [partial(route, x, g, bias, GATE) for g in gates]
            self.add(f"gate {rows} {dtype}", calls, EXPERTS * HIDDEN * 4, error=error)
            calls = [partial(moe.route, x, g, bias, GATE) for g in gates]
            if not self.compile_only:
                self.add(f"gate {rows} {dtype} torch", calls, EXPERTS * HIDDEN * 4)

    def heads(self, rows: int) -> None:
        """Products by heads."""
        copies = 2 if self.compile_only else 6
        expand = [rows_of(HEADS, NOPE + VALUE, RANK, seed=i) * 0.05 for i in range(copies)]
        query = rows_of(rows, HEADS, NOPE + 64)[..., :NOPE]
        latents = rows_of(rows, HEADS, RANK)
        out = torch.empty(rows, HEADS, RANK + 64, dtype=torch.bfloat16, device=CUDA)[..., :RANK]
        size = HEADS * NOPE * RANK * 2 + rows * HEADS * (NOPE + RANK) * 2
        operations = 2.0 * rows * HEADS * NOPE * RANK

        def error() -> float:
            absorb(query, expand[0][:, :NOPE], out)
            return error_of(out, torch.einsum("thn,hnr->thr", query.double(), expand[0][:, :NOPE].double()))

        def value_error() -> float:
            wanted = torch.einsum("thr,hvr->thv", latents.double(), expand[0][:, NOPE:].double())
            return error_of(expand_values(latents, expand[0][:, NOPE:]), wanted)

        self.add(
            f"heads absorb {rows}",
            [partial(absorb, query, w[:, :NOPE], out) for w in expand],
            size,
            operations,
            BF16,
            error,
        )
        self.add(
            f"heads values {rows}",
            [partial(expand_values, latents, w[:, NOPE:]) for w in expand],
            size,
            operations,
            BF16,
            value_error,
        )
        self.add(
            f"heads values quantised {rows}",
            [partial(expand_values_rows, latents, w[:, NOPE:]) for w in expand],
            size,
            operations,
            BF16,
        )
        if not self.compile_only:
            turned, place = query.transpose(0, 1), out.transpose(0, 1)
            self.add(
                f"heads absorb {rows} torch.bmm",
                [partial(torch.bmm, turned, w[:, :NOPE], out=place) for w in expand],
                size,
                operations,
                BF16,
            )
            values = torch.empty(rows, HEADS, VALUE, dtype=torch.bfloat16, device=CUDA).transpose(0, 1)
            self.add(
                f"heads values {rows} torch.bmm",
                [
                    partial(torch.bmm, latents.transpose(0, 1), w[:, NOPE:].transpose(1, 2), out=values)
                    for w in expand
                ],
                size,
                operations,
                BF16,
            )

    def small(self, rows: int) -> None:
        """Launches that quantise."""
        x, gain = rows_of(rows, HIDDEN), rows_of(HIDDEN)
        self.add(f"quantise {rows}", [lambda: quantise_rows(x)] * 8, rows * HIDDEN * 3)
        self.add(
            f"norm, quantise {rows}",
            [lambda: add_rms_norm_rows(x, x, gain, 1e-6, keep=True)] * 8,
            rows * HIDDEN * 9,
        )

    def all(self) -> None:
        """Every case."""
        self.experts(2048, 16)
        self.experts(512, 16)
        self.products((1, 16, 64))
        self.experts(16, 16)
        for rows in (1, 16, 64):
            self.gate(rows)
            self.heads(rows)
        self.small(16)
        self.products((512, 2048))
        self.experts(64, 16)
        for rows in (512, 2048):
            self.gate(rows)
            self.heads(rows)
        self.small(2048)
        self.experts(512, EXPERTS)
        self.experts(1, EXPERTS)
        self.experts(16, EXPERTS)


def _tiles(rows: int, outputs: int, inputs: int) -> list[ProductTile]:
    """Other divisions of a product."""
    if rows >= 512:
        return [ProductTile(64, 3, 4), ProductTile(128, 3, 8), ProductTile(128, 4, 8)]
    if rows != 16:
        return []
    steps = num_blocks(inputs)
    fixed = [ProductTile(16, 5, 4, splits) for splits in (1, 2, 4, 8, 14, 28) if splits <= steps // 2]
    return [*fixed, ProductTile(16, 3, 4, 4), ProductTile(16, 8, 4, 4)]


def _expert_tiles(rows: int, count: int) -> list[ExpertTile | WideTile]:
    """Other divisions of products with experts."""
    if rows <= 16:
        shapes: list[tuple[int, int, int, int]] = [(2, 4, 3, 4), (4, 4, 5, 4), (3, 8, 5, 8), (3, 4, 8, 4)]
        sizes: tuple[int, ...] = (16,)
    elif rows * CHOSEN / count <= 64:
        shapes, sizes = [(3, 4, 5, 4), (3, 8, 4, 4)], (32, 64)
    else:
        return [WideTile(128, 4, 4, 8), WideTile(64, 2, 2, 4)]
    return [ExpertTile(size, *shape) for size in sizes for shape in shapes]


def scaled_mm(x: QuantisedRows, weight: BlockWeight) -> Tensor:
    """torch's own product with blocks of scales."""
    made: Tensor = torch._scaled_mm(x.values, weight.values.T, x.scales.T, weight.scales.T, out_dtype=x.dtype)
    return made


def main() -> None:
    """Check and time, print a table, write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--variants", action="store_true", help="also other divisions than the chosen ones")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    compilers = Compilers()
    first = Bench(args.only, args.variants)
    first.compile_only = True
    with compilers.together():
        first.all()
    compilers.close()
    print(f"{'case':64} {'us':>9} {'floor':>8} {'ratio':>7} {'error':>10}")
    bench = Bench(args.only, args.variants)
    try:
        bench.all()
    finally:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            rows = [asdict(figure) for figure in bench.figures]
            (args.out / "experts.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
