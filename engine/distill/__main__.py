"""`python -m engine.distill`: train an indexer for a dense checkpoint and write it as an overlay.

Started by `dsa distill`. Leaves in its folder: log.jsonl, loss.png, checkpoint.pt (to resume from),
evaluation.json and indexer.safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.build import resolve_device, resolve_dtype
from engine.checkpoint.loader import load
from engine.checkpoint.overlay import write_overlay
from engine.checkpoint.source import open_source
from engine.distill.evaluate import held_out
from engine.distill.plot import plot_log
from engine.distill.sequences import Split
from engine.distill.student import Student
from engine.distill.train import Recipe, StepLog, Trainer
from engine.distill.trunk import Trunk
from engine.errors import EngineError
from engine.models.llama import LlamaConfig, weight_table
from engine.protocol import IndexerInfo


def main() -> None:
    """Parse, train, evaluate, write."""
    try:
        run(arguments())
    except (EngineError, ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        sys.exit(1)


def arguments() -> argparse.Namespace:
    """The command line; each field of `Recipe` is a flag."""
    parser = argparse.ArgumentParser(prog="dsa distill", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="dense checkpoint: .gguf file or folder")
    parser.add_argument("--corpus", type=Path, required=True, help="folder made by python -m server.corpus")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the results; resumed if it holds a run"
    )
    parser.add_argument("--heads", type=int, default=8, help="indexer heads")
    parser.add_argument("--dim", type=int, default=64, help="dims of an indexer head")
    parser.add_argument("--rope", type=int, default=32, help="rotated dims of an indexer head")
    parser.add_argument(
        "--default-top-k", type=int, default=256, help="what the server uses where a request says nothing"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--until", type=int, help="stop at this step, to go on another time")
    parser.add_argument(
        "--evaluate-every", type=int, default=0, help="steps between evaluations; 0: at the end only"
    )
    parser.add_argument("--evaluate-kind", type=int, default=3, help="held-out sequences of each kind")
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON, e.g. '{\"warmup_steps\": 50}'")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """Train as the options say.

    Raises:
        EngineError: the checkpoint, the corpus or the device.
        ValueError: the recipe.
    """
    console = Console()
    recipe = msgspec.convert(options.recipe, Recipe)
    info = IndexerInfo(
        num_heads=options.heads, head_dim=options.dim, rope_dim=options.rope, default_top_k=options.default_top_k,
        source="indexer.safetensors",
    )  # fmt: skip
    device = resolve_device(options.device)
    source = open_source(options.weights)
    config = LlamaConfig.read(source.config)
    dtype = resolve_dtype(options.dtype, device)
    weights, _ = load(weight_table(config, None), source, dtype=dtype, device=device)
    trunk = Trunk(config, weights, config.max_positions, device)
    student = Student(config, info, config.max_positions, device, recipe.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(trunk, student, Split.open(options.corpus, "train"), recipe, options.out)
    if trainer.resume():
        console.print(f"resuming at step {trainer.step} of {recipe.total_steps}")
    heldout = Split.open(options.corpus, "heldout")
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=recipe.total_steps, completed=trainer.step, status="")

        def show(log: StepLog) -> None:
            mean = sum(log.loss) / len(log.loss)
            recall = sum(log.recall) / len(log.recall)
            status = f"{log.stage} KL {mean:.4f} recall {recall:.4f} {log.seconds:.2f} s"
            bar.update(task, advance=1, status=status)
            if not bar.console.is_terminal and log.step % 20 == 0:
                bar.console.print(f"step {log.step} {status}")
            if options.evaluate_every and log.step and log.step % options.evaluate_every == 0:
                table = held_out(trunk, student, heldout, device, per_kind=1)
                bar.console.print_json(json.dumps({name: row["all"] for name, row in table.items()}))

        trainer.run(show, until=options.until)
    plot_log(options.out / "log.jsonl", options.out / "loss.png")
    described = json.dumps({"recipe": json.loads(msgspec.json.encode(recipe)), "steps": trainer.step})
    tensors = {name: p.detach().to(torch.float16) for name, p in student.parameters.items()}
    write_overlay(options.out / "indexer.safetensors", tensors, info, described, source)
    table = held_out(trunk, student, heldout, device, per_kind=options.evaluate_kind, baselines=True)
    (options.out / "evaluation.json").write_text(json.dumps(table, indent=1))
    for name, row in table.items():
        above = "  ".join(f"{kind} {value - table['dense'][kind]:+.4f}" for kind, value in row.items())
        console.print(f"{name:12} {row['all']:.4f}   above dense: {above}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
