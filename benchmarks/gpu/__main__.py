"""Everything about one GPU in one run of less than ten minutes: conformance, kernels, the step, the model over HTTP.

    python -m benchmarks.gpu [WEIGHTS] [--overlay FILE] [--out DIR] [--budget SECONDS] [--only doctor,kernels,...]
    python -m benchmarks.gpu --from report.json --out DIR      # the table and the picture again, on any machine

Each stage is a program of its own, in the order of what matters. A stage that does not fit into the budget is skipped, and
one whose time is over is stopped; what it has measured so far counts. DIR gets report.json, report.md, report.png, and what
each stage wrote and printed. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import draw, tables
from benchmarks.gpu.stages import ROOT, Stage, run_all

BUDGET = 570.0


def stages(weights: Path | None, overlay: Path | None, out: Path) -> list[Stage]:
    """All of them. Those that need a model are left out without one, and that over HTTP if there is no such program."""
    model = (
        [] if weights is None else [str(weights), *([] if overlay is None else ["--overlay", str(overlay)])]
    )
    found = [
        Stage("doctor", ["lab.doctor.run", str(out / "doctor.json")], out / "doctor.json", 20, 90),
        Stage("kernels", ["benchmarks.gpu.kernels", "--no-conformance", "--out", str(out)], out / "kernels.json", 60, 150),
    ]  # fmt: skip
    if model:
        step = ["benchmarks.gpu.step", *model, "--out", str(out), "--only", "decode,prompt,equality"]
        found.append(Stage("step", step, out / "step.json", 60, 150))
        if (ROOT / "benchmarks" / "gpu" / "http.py").exists():
            parts = ["--only", "start,decode,streams,prompts", "--rounds", "2"]
            http = ["benchmarks.gpu.http", *model, "--out", str(out), *parts]
            found.append(Stage("http", http, out / "http.json", 60, 180))
    pointwise = ["benchmarks.gpu.pointwise", "--out", str(out / "pointwise.json")]
    found.append(Stage("pointwise", pointwise, out / "pointwise.json", 40, 120))
    shape = ["benchmarks.gpu.shape", "--out", str(out)]
    found.append(Stage("shape", shape, out / "shape.json", 90, 150))
    return found


def about() -> dict[str, Any]:
    """What measured."""
    import torch

    triton = None
    if importlib.util.find_spec("triton") is not None:
        import triton as module

        triton = module.__version__
    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton,
        "python": sys.version.split()[0],
    }  # fmt: skip


def write(found: dict[str, Any], out: Path) -> None:
    """Write the tables and the picture of a report."""
    (out / "report.md").write_text(tables(found), "utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print(
            f"no picture: matplotlib is not installed; elsewhere: python -m benchmarks.gpu --from {out}/report.json"
        )
    elif not draw(found, out / "report.png"):
        print("no picture: there are neither kernels nor steps to draw")


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "weights", type=Path, nargs="?", help="a .gguf file or a folder; without it no model is run"
    )
    parser.add_argument("--overlay", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS")
    parser.add_argument("--only", metavar="NAME,NAME", help="stages to run")
    parser.add_argument(
        "--from", dest="report", type=Path, metavar="FILE", help="a report.json; nothing is measured"
    )
    asked = parser.parse_args(arguments)
    out = asked.out.absolute()
    if asked.report is not None:
        out.mkdir(parents=True, exist_ok=True)
        write(json.loads(asked.report.read_text("utf-8")), out)
        return 0
    chosen = stages(
        None if asked.weights is None else asked.weights.absolute(),
        None if asked.overlay is None else asked.overlay.absolute(),
        out,
    )
    if asked.only is not None:
        names = asked.only.split(",")
        if unknown := set(names) - {stage.name for stage in chosen}:
            parser.error(
                f"--only has {', '.join(sorted(unknown))}; there are {', '.join(one.name for one in chosen)}"
            )
        chosen = [stage for stage in chosen if stage.name in names]
    if asked.weights is not None and not asked.weights.exists():
        parser.error(f"{asked.weights} does not exist; name a .gguf file or a folder")
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write("error: torch finds no CUDA device here; `dsa doctor` says what is missing\n")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    machine = about()
    outcomes = run_all(chosen, asked.budget, out)
    found = {"about": machine, "budget": asked.budget, "stages": [asdict(one) for one in outcomes]}
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    write(found, out)
    print((out / "report.md").read_text("utf-8"))
    return int(any(one.state == "failed" for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
