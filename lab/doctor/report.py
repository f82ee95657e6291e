"""An examination as tables for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_RATES = (("copy", "copy GB/s", 1e9), ("read", "read GB/s", 1e9), ("bf16", "bf16 TFLOP/s", 1e12),
          ("fp8", "fp8 TFLOP/s", 1e12), ("float32", "float32 TFLOP/s", 1e12))  # fmt: skip
BACKENDS = ("native", "triton", "torch", "reference")


def show(found: dict[str, Any], console: Console) -> None:
    """Print an examination.

    Args:
        found: as `lab.doctor.run.examination` returned it
        console: where to
    """
    parts: list[RenderableType] = [_machine(found["machine"])]
    if found["conformance"]:
        parts.append(_conformance(found))
    if found["rates"]:
        parts.append(_rates(found["rates"]))
    for part in parts:
        console.print(Padding(part, (0, 0, 1, 0)))
    for sentence in found["advice"]:
        console.print(Text(f"- {sentence}"), soft_wrap=True)
    console.print(Text(_end(found)), soft_wrap=True)


def _end(found: dict[str, Any]) -> str:
    chosen = found["chosen"]
    what = f"dsa serve would compute with {chosen['backend']} on {chosen['device']} in {chosen['dtype']}"
    verdict = {True: "it passes here", False: "it FAILS here", None: "it was not checked"}[found["passed"]]
    return f"{what}: {verdict} ({found['seconds']:.0f} s)"


def _machine(machine: dict[str, Any]) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    cpu, gpu, native = machine["cpu"], machine["gpu"], machine["native"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["versions"].items())
    table.add_row("system", Text(f"{machine['system']}, Python {machine['python']}"))
    table.add_row("packages", Text(versions))
    bf16 = "multiplies bfloat16" if cpu["multiplies_bf16"] else "does not multiply bfloat16"
    table.add_row("cpu", Text(f"{cpu['name']}, {cpu['cores']} cores, {bf16}"))
    table.add_row("memory", f"{_size(cpu['memory_bytes'])}, {_size(cpu['free_bytes'])} free")
    level = native["level"] or f"none: {native['missing']}"
    made = ", ".join(native["levels_of_this_machine"]) or "no level"
    compiler = native["compiler"] or "no compiler (ziglang)"
    table.add_row("native", Text(f"{level} (made for this kind of machine: {made}; {compiler})"))
    cuda = (
        f"CUDA {gpu['torch_cuda']}"
        if gpu["torch_cuda"]
        else f"HIP {gpu['torch_hip']}"
        if gpu["torch_hip"]
        else "without CUDA"
    )
    driver = f"driver {gpu['driver']}" if gpu["driver"] else "no NVIDIA driver"
    table.add_row(
        "gpu software", Text(f"{driver}; torch {cuda}; {gpu['triton_missing'] or 'Triton can compile'}")
    )
    for device in gpu["devices"]:
        table.add_row(
            device["device"],
            Text(
                f"{device['name']}, compute capability {device['capability']}, {_size(device['memory_bytes'])}, "
                f"{_size(device['free_bytes'])} free"
            ),
        )
    if not gpu["devices"]:
        table.add_row("gpu", f"none ({gpu['on_the_bus']} on the PCI bus)")
    return table


def _conformance(found: dict[str, Any]) -> RenderableType:
    table = Table("backend", "device", "result", "checks", "s", title="conformance", title_justify="left")
    failures: list[str] = []
    rank = {name: number for number, name in enumerate(BACKENDS)}
    for one in sorted(found["conformance"], key=lambda one: (one["device"], rank[one["backend"]])):
        result = Text("passes", "green") if one["passed"] else Text("fails", "bold red")
        table.add_row(one["backend"], one["device"], result, str(one["checks"]), f"{one['seconds']:.0f}")
        failures += [f"{one['backend']} on {one['device']}: {failure}" for failure in one["failures"]]
    checked = {one["backend"] for one in found["conformance"]}
    for name in BACKENDS:
        if name not in checked:
            table.add_row(name, "-", "cannot run here", "", "")
    return Group(table, *(Text(failure, "red") for failure in failures))


def _rates(found: dict[str, dict[str, float]]) -> RenderableType:
    shown = [one for one in _RATES if any(one[0] in rates for rates in found.values())]
    table = Table("device", *(heading for _, heading, _ in shown), title="rates", title_justify="left")
    for device, rates in found.items():
        cells = [f"{rates[name] / unit:,.4g}" if name in rates else "" for name, _, unit in shown]
        table.add_row(device, *cells)
    return table


def _size(num_bytes: int | None) -> str:
    return "?" if num_bytes is None else f"{num_bytes / (1 << 30):.1f} GiB"
