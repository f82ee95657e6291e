"""Train a lightning indexer for a dense checkpoint and write it as an overlay.

Leaves in the folder of --out: log.jsonl, loss.png, checkpoint.pt (to resume from), evaluation.json and
indexer.safetensors. Started by `dsa distill`; alone it is `python -m lab.distill`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import msgspec
import torch
from rich.console import Console

from engine.checkpoint.overlay import Overlay, base_fingerprint, read_overlay, write_overlay
from engine.checkpoint.source import Source, open_source
from engine.errors import ConfigError, EngineError
from engine.models.gqa.config import GqaConfig
from engine.protocol import IndexerInfo
from engine.step.build import resolve_device, resolve_dtype
from lab.distill.adapter import Adapter
from lab.distill.base import open_trunk
from lab.distill.evaluate import BEYOND, held_out
from lab.distill.recipe import EXAMPLE, Recipe, read_recipe
from lab.distill.report import Report
from lab.distill.sequences import Split
from lab.distill.student import Student
from lab.distill.train import StepLog, Trainer

_SIZES = {"heads": 8, "dim": 64, "rope": 32}
"""An indexer's sizes where nothing else is asked for."""

STOPPED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, evaluate, write; the exit status."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except torch.OutOfMemoryError:
        error: object = "the device has too little memory; lower the recipe's rows or max_length"
    except (EngineError, OSError) as fault:
        error = fault
    except KeyboardInterrupt:
        return STOPPED
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
    return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    fields = json.loads(msgspec.json.encode(Recipe()))
    made = argparse.ArgumentParser(
        prog="python -m lab.distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="the recipe's fields and their defaults:\n"
        + "\n".join(f"  {name}: {json.dumps(value)}" for name, value in fields.items()),
    )
    add = made.add_argument
    add("--weights", type=Path, required=True, help="dense checkpoint: .gguf file or folder")
    add("--corpus", type=Path, required=True, help="folder made by python -m lab.corpus")
    add("--out", type=Path, required=True, help="folder for the results; resumed if it holds a run")
    add("--recipe", default="{}", help=f"JSON, such as '{EXAMPLE}'; its fields are below")
    add("--heads", type=int, default=_SIZES["heads"], help="indexer heads (%(default)s)")
    add("--dim", type=int, default=_SIZES["dim"], help="dims of an indexer head (%(default)s)")
    add("--rope", type=int, default=_SIZES["rope"], help="rotated dims of an indexer head (%(default)s)")
    add("--default-top-k", type=int, default=512, help="for requests that say nothing (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="(%(default)s)")
    add(
        "--start-from",
        type=Path,
        help="an indexer overlay of this checkpoint to go on from, not from random weights",
    )
    add("--until", type=int, help="stop at this step, to go on another time")
    add(
        "--evaluate-every", type=int, default=0, help="steps between evaluations; 0: at the end (%(default)s)"
    )
    add(
        "--evaluate-kind",
        type=int,
        default=3,
        help="held-out sequences of each kind; 0: no evaluation (%(default)s)",
    )
    return made


def run(options: argparse.Namespace) -> int:
    """Train as the options say; the exit status.

    Raises:
        EngineError: the recipe, the checkpoint, the corpus or the device.
    """
    try:  # an extra, and better missed now than after the training
        from lab.distill.plot import plot_log
    except ImportError:
        raise ConfigError(
            "matplotlib is not installed; training needs it: pip install 'dsa-serve[train]'"
        ) from None
    recipe = read_recipe(options.recipe)
    device = resolve_device(options.device)
    if device.type == "cuda":
        # Products of float32 then round their inputs to 10 bits of mantissa. The main model's queries and keys
        # have 7 (bfloat16), so targets stay the same; the indexer's gradients carry more noise than that anyway.
        torch.set_float32_matmul_precision("high")
    source = open_source(options.weights)
    dtype = resolve_dtype(options.dtype, device)
    trunk = open_trunk(source, dtype, device)
    config = trunk.config
    splits = {name: Split.open(options.corpus, name, config.vocab_size) for name in ("train", "heldout")}
    start = None if options.start_from is None else read_overlay(options.start_from, source)
    info = _indexer(options) if start is None else _same_sizes(start.info, options)
    adapter = _adapter(recipe, config, device, start)
    info = msgspec.structs.replace(info, adapter_rank=0 if adapter is None else adapter.rank)
    student = Student(config, info, config.max_positions, device, recipe.seed)
    if start is not None:
        student.load({name: start.tensors.read(name, torch.float32) for name in student.parameters})
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    began = "random weights" if start is None else hashlib.sha256(options.start_from.read_bytes()).hexdigest()
    trainer = Trainer(trunk, student, splits["train"], recipe, out, base_fingerprint(source), began, adapter)
    console = Console()
    if trainer.resume():
        console.print(f"resuming at step {trainer.step} of {recipe.total_steps}", highlight=False)

    def table(per_kind: int, *, baselines: bool) -> dict[str, dict[str, float]]:
        return held_out(
            trunk, student, splits["heldout"], device, per_kind=per_kind, baselines=baselines, adapter=adapter
        )

    with Report(console, trainer.step, recipe.total_steps) as report:

        def show(log: StepLog) -> None:
            report.step(log)
            if options.evaluate_every and log.step and log.step % options.evaluate_every == 0:
                for line in _lines(table(1, baselines=False)):
                    report.say(line)

        stopped = _train(trainer, show, options.until)
    if stopped:
        report.say(f"stopped at step {trainer.step}; the same command goes on from there")
        return STOPPED
    plot_log(out / "log.jsonl", out / "loss.png", recipe.report_top_k)
    _write(out / "indexer.safetensors", trainer, info, recipe, source, start)
    if options.evaluate_kind > 0:
        figures = table(options.evaluate_kind, baselines=True)
        (out / "evaluation.json").write_text(json.dumps(figures, indent=1))
        for line in _lines(figures):
            report.say(line)
    report.say(f"to serve it: dsa serve {options.weights} --overlay {out / 'indexer.safetensors'}")
    return 0


def _adapter(
    recipe: Recipe, config: GqaConfig, device: torch.device, start: Overlay | None
) -> Adapter | None:
    """What the recipe's last stage trains: new, or the one that training starts from.

    Raises:
        ConfigError: that one has another rank, or the recipe would leave it untrained while the indexers move.
    """
    before = 0 if start is None else start.info.adapter_rank
    if not recipe.adapt_steps:
        if before:
            raise ConfigError(
                "the overlay to start from has an adapter, which suits its indexers only; add adapt_steps to the recipe"
            )
        return None
    if before not in (0, recipe.adapter_rank):
        raise ConfigError(
            f"the overlay to start from has an adapter of rank {before}; set the recipe's adapter_rank to that"
        )
    adapter = Adapter(config, recipe.adapter_rank, device, recipe.seed)
    if start is not None and before:
        adapter.load({name: start.tensors.read(name, torch.float32) for name in adapter.parameters})
    return adapter


def _indexer(options: argparse.Namespace) -> IndexerInfo:
    """The indexer's sizes, checked now: writing the overlay would find them wrong after all the work."""
    for flag in ("heads", "dim", "rope", "default_top_k"):
        if getattr(options, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(options, flag)}; expected at least 1")
    if options.rope % 2 or options.rope > options.dim:
        raise ConfigError(f"--rope is {options.rope}; expected an even number up to --dim ({options.dim})")
    return IndexerInfo(
        num_heads=options.heads, head_dim=options.dim, rope_dim=options.rope, default_index_top_k=options.default_top_k,
        source="indexer.safetensors",
    )  # fmt: skip


def _same_sizes(info: IndexerInfo, options: argparse.Namespace) -> IndexerInfo:
    """The indexer that training starts from, with this run's default top_k; flags that differ are a mistake.

    Raises:
        ConfigError: heads, dims or rotated dims were asked for that it does not have.
    """
    sizes = {"heads": info.num_heads, "dim": info.head_dim, "rope": info.rope_dim}
    for flag, value in sizes.items():
        if getattr(options, flag) not in (value, _SIZES[flag]):
            raise ConfigError(
                f"--{flag} is {getattr(options, flag)}, but {options.start_from} has {value}; leave the flag out"
            )
    return msgspec.structs.replace(
        info, default_index_top_k=options.default_top_k, source="indexer.safetensors"
    )


def _train(trainer: Trainer, show: Callable[[StepLog], None], until: int | None) -> bool:
    """Run; True if a signal ended it early. The first signal lets the step end, the second does not."""
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        trainer.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.run(show, until=until)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stopped


def _write(
    path: Path, trainer: Trainer, info: IndexerInfo, recipe: Recipe, source: Source, start: Overlay | None
) -> None:
    """The overlay of what was trained so far, with how, and with how the one was that it started from."""
    made: dict[str, object] = {"recipe": json.loads(msgspec.json.encode(recipe)), "steps": trainer.step}
    if start is not None:
        made["start"] = json.loads(start.recipe)
    tensors = {name: p.detach().to(torch.float16) for name, p in trainer.parameters().items()}
    write_overlay(path, tensors, info, json.dumps(made), source)


def _lines(table: dict[str, dict[str, float]]) -> list[str]:
    """An evaluation as text: each selection's loss, and by kind how much it is above dense."""
    if not table:
        return [
            f"nothing evaluated: that takes held-out sequences, and room in the model, of {2 * BEYOND} tokens"
        ]
    lines = [f"held-out loss beyond position {BEYOND}, nats, and by kind of text above dense:"]
    for name, row in table.items():
        above = "  ".join(f"{kind} {value - table['dense'][kind]:+.4f}" for kind, value in row.items())
        lines.append(f"{name:12} {row['all']:.4f}   {above}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
