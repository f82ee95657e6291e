"""Dense attention of prompts over cached latents on one GPU: checked, then timed, its launches one by one.

    python -m benchmarks.gpu.latent_prompts [--out DIR] [--variants]

One layer of DeepSeek-V3.2's sizes, FP8 latents. Times are milliseconds a call: medians. A floor is what the products take at
794 TFLOP/s in bfloat16 (one H200, measured; see `log.md`). Errors are of some rows and heads, against float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from engine.attention.precision import LatentFormat
from engine.kernels.torchops.attention import VectorisedKernels
from engine.kernels.triton import latent_expanded
from engine.kernels.triton.expanded_plan import DenseChunk, ExpandedPlan, plan_expanded
from engine.kernels.triton.latent_expanded import attend_expanded, block_rows
from engine.kernels.triton.rows import Rows
from engine.memory.layouts import LatentLayout

BF16 = 794e12  # operations a second
CUDA = torch.device("cuda")
HEADS, NOPE, ROPE, VALUE, RANK = 128, 128, 64, 128, 512
SCALE = (NOPE + ROPE) ** -0.5
CASES = ((2048, 0), (2048, 8192), (512, 8192), (512, 131072 - 512))  # rows of a chunk, tokens before it
SEEN_ROWS, SEEN_HEADS = 6, (0, 77)


@dataclass
class Figure:
    """What a case took, in ms."""

    name: str
    ms: float
    floor: float
    error: float | None
    launches: dict[str, float]


@dataclass
class Case:
    """Operands of one chunk."""

    query: Tensor
    plane: Tensor
    latents: Tensor  # [C, r + p] bfloat16, what the plane holds
    rows: Rows
    plan: ExpandedPlan
    expand: Tensor
    out: Tensor

    def run(self) -> None:
        """The call that is timed."""
        attend_expanded(self.query, self.plane, self.rows, self.plan, self.expand, RANK, SCALE, self.out)

    def error(self) -> float:
        """The deviation of the difference over that of the numbers, of some rows and heads."""
        self.run()
        count = len(self.query)
        wrong, size = [], []
        for row in {0, count - 1, *torch.linspace(0, count - 1, SEEN_ROWS).long().tolist()}:
            seen = self.latents[: int(self.rows.positions[row]) + 1].double()
            for head in SEEN_HEADS:
                query, expand = self.query[row, head].double(), self.expand[head].double()
                keys = torch.cat((seen[:, :RANK] @ expand[:NOPE].T, seen[:, RANK:]), dim=1)
                shares = torch.softmax(keys @ query * SCALE, dim=0)
                exact = expand[NOPE:] @ (shares @ seen[:, :RANK])
                wrong.append(self.out[row, head].double() - exact)
                size.append(exact)
        return float(torch.cat(wrong).std() / torch.cat(size).std())


def case_of(rows: int, before: int, tokens: int) -> Case:
    """Random operands of a chunk of so many rows, behind so many tokens."""
    generator = torch.Generator(CUDA).manual_seed(before)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=CUDA, generator=generator).bfloat16()

    context = before + rows
    pages = -(-context // 64)
    format_ = LatentFormat(LatentLayout(RANK, ROPE), "fp8", torch.bfloat16)
    packed = format_.pack(made(pages * 64, RANK + ROPE), VectorisedKernels())
    table = torch.randperm(pages, device=CUDA, generator=generator).int()
    plane = torch.empty_like(packed).view(pages, 64, -1)
    plane[table.long()] = packed.view(pages, 64, -1)
    positions = torch.arange(before, context, device=CUDA).int()
    zeros = torch.zeros(rows, dtype=torch.int32, device=CUDA)
    plan = plan_expanded([DenseChunk(0, 0, rows, before)], block_rows(torch.bfloat16), tokens).to(CUDA)
    return Case(
        made(rows, HEADS, NOPE + ROPE), plane, format_.unpack(packed), Rows(zeros, positions, zeros, table[None]), plan,
        made(HEADS, NOPE + VALUE, RANK) * RANK**-0.5, torch.empty(rows, HEADS, VALUE, dtype=torch.bfloat16, device=CUDA),
    )  # fmt: skip


def time_of(call: Callable[[], object], least: int = 5) -> float:
    """Milliseconds: a median."""
    call()
    times: list[float] = []
    for _ in range(least):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def launches_of(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kernel, all its launches together."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return {
        event.key[:24]: event.device_time_total / 1e3
        for event in seen.key_averages()
        if event.device_time_total > 0
    }


def measure(name: str, case: Case, rows: int, before: int, *, check: bool = True) -> Figure:
    """Check and time one case."""
    error = case.error() if check else None
    pairs = rows * before + rows * (rows + 1) / 2
    work = 2.0 * HEADS * (pairs * (NOPE + ROPE + VALUE) + (before + rows) * RANK * (NOPE + VALUE))
    figure = Figure(name, time_of(case.run), work / BF16 * 1e3, error, launches_of(case.run))
    parts = ", ".join(f"{key} {ms:.2f}" for key, ms in figure.launches.items())
    print(
        f"{name:48} {figure.ms:8.2f} {figure.floor:8.2f} {figure.ms / figure.floor:6.2f} {error}  {parts}",
        flush=True,
    )
    return figure


def main() -> None:
    """Check and time, print a table, write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variants", action="store_true", help="also other shapes than the chosen ones")
    args = parser.parse_args()
    figures: list[Figure] = []
    print(f"{'rows behind tokens':48} {'ms':>8} {'floor':>8} {'ratio':>6} error")
    for rows, before in CASES:
        try:
            case = case_of(rows, before, 8192)
            figures.append(measure(f"{rows} behind {before}", case, rows, before))
            if args.variants and before > 100_000:
                figures += _variants(case, rows, before)
        except Exception as problem:
            print(f"{rows} behind {before}: FAILED {type(problem).__name__}: {problem}", flush=True)
            traceback.print_exc(limit=3)
    latents, weight = (
        torch.randn(8192, RANK, device=CUDA).bfloat16(),
        torch.randn(HEADS * (NOPE + VALUE), RANK, device=CUDA).bfloat16(),
    )
    ms = time_of(lambda: latents @ weight.T)
    floor = 2.0 * 8192 * RANK * len(weight) / BF16 * 1e3
    figures.append(Figure("the library's expansion of 8192 tokens", ms, floor, None, {}))
    print(f"{figures[-1].name:48} {ms:8.3f} {floor:8.3f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(figure) for figure in figures], indent=1) + "\n"
        (args.out / "latent_prompts.json").write_text(text)


def _variants(case: Case, rows: int, before: int) -> list[Figure]:
    """Other shapes of the two products' launches."""
    made = []
    chosen, chosen_product = latent_expanded._attend_shape, latent_expanded._product_shape
    shape = latent_expanded._Shape
    for form in (shape(64, 8, 2), shape(128, 8, 2), shape(64, 4, 2)):
        latent_expanded._attend_shape = lambda *_, form=form: form
        try:
            made.append(measure(f"  attention {tuple(form)}", case, rows, before))
        except Exception as problem:
            print(f"  attention {tuple(form)}: FAILED {problem}", flush=True)
    latent_expanded._attend_shape = chosen
    for form in (shape(128, 8, 3), shape(128, 4, 4), shape(256, 8, 4)):
        latent_expanded._product_shape = lambda *_, form=form: form
        try:
            made.append(measure(f"  expansion {tuple(form)}", case, rows, before, check=False))
        except Exception as problem:
            print(f"  expansion {tuple(form)}: FAILED {problem}", flush=True)
    latent_expanded._product_shape = chosen_product
    return made


if __name__ == "__main__":
    main()
