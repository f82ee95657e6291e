"""Trains a lightning indexer for a dense checkpoint, and writes it as an overlay.

It writes into the folder of --out: log.jsonl, loss.png, checkpoint.pt (to resume from), evaluation.json and
indexer.safetensors. The training loop itself is `lab.distill.train`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec
import torch
from rich.console import Console

from engine.checkpoint.overlay import Overlay, base_fingerprint, read_overlay, write_overlay
from engine.checkpoint.source import Source, open_source
from engine.errors import ConfigError
from engine.models.gqa.config import GqaConfig
from engine.parallel.ranks import Ranks
from engine.protocol import IndexerInfo
from engine.step.build import resolve_device, resolve_dtype
from lab.distill.adapter import Adapter
from lab.distill.base import open_trunk
from lab.distill.evaluate import held_out
from lab.distill.parallel import part, together
from lab.distill.recipe import Recipe, read_recipe
from lab.distill.report import TrainingReport
from lab.distill.sequences import CorpusSplit
from lab.distill.student import Student
from lab.distill.timing import fitted
from lab.distill.train import StepLog, Trainer

_SIZES = (8, 64, 32)
"""The indexer's default sizes: heads, numbers in each head, and how many of these are rotated."""

LEAST_TOP_K = 512
"""Held-out loss is of the default top_k and of half of it, beyond twice of it, in eight times of it: with this, at least."""

STOPPED = 130
"""Exit status after Ctrl-C, the same as in shells."""


@dataclass(frozen=True, kw_only=True)
class DistillPlan:
    """What to train; `dsa distill --help` describes the fields. A size that is None is the one in `_SIZES`."""

    weights: Path
    corpus: Path
    out: Path
    recipe: str = "{}"
    start_from: Path | None = None
    until: int | None = None
    minutes: float | None = None
    drop_adapter: bool = False
    device: str = "auto"
    devices: int = 1
    dtype: str = "auto"
    evaluate_every: int = 0
    evaluate_kind: int = 3
    heads: int | None = None
    dim: int | None = None
    rope: int | None = None
    default_top_k: int = 512


def run(plan: DistillPlan) -> int:
    """Train, evaluate and write; return the exit status.

    Raises:
        EngineError: the recipe, the checkpoint, the corpus or the device cannot be used.
    """
    try:  # matplotlib is an extra; if it is missing, say so now and not after the training
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "matplotlib is not installed; training needs it: pip install 'dsa-serve[train]'"
        ) from None
    if read_recipe(plan.recipe).sequences_per_step < plan.devices:
        raise ConfigError(
            f"--devices is {plan.devices}, but the recipe has fewer sequences_per_step; raise that"
        )
    with together(plan.devices, functools.partial(_device, plan), functools.partial(_work, plan)) as ranks:
        return _work(plan, ranks)


def _device(plan: DistillPlan, rank: int) -> torch.device:
    return resolve_device(plan.device, rank, plan.devices)


def _work(plan: DistillPlan, ranks: Ranks) -> int:
    try:
        return _run(plan, ranks)
    except torch.OutOfMemoryError:
        raise ConfigError("the device has too little memory; lower the recipe's rows or max_length") from None


def _run(plan: DistillPlan, ranks: Ranks) -> int:
    recipe = read_recipe(plan.recipe)
    device = _device(plan, ranks.rank)
    if device.type == "cuda":
        # Float32 products then round their inputs to 10 bits of mantissa. The main model's queries and keys have
        # 7 bits (bfloat16), so the targets do not change. The indexer's gradients have more noise than this rounding.
        torch.set_float32_matmul_precision("high")
    source = open_source(plan.weights)
    trunk = open_trunk(source, resolve_dtype(plan.dtype, device), device)
    config = trunk.config
    splits = {name: CorpusSplit.open(plan.corpus, name, config.vocab_size) for name in ("train", "heldout")}
    start = None if plan.start_from is None else read_overlay(plan.start_from, source)
    info = _indexer(plan) if start is None else _same_sizes(start.info, plan)
    adapter = _adapter(recipe, config, device, start, drop=plan.drop_adapter)
    info = msgspec.structs.replace(info, adapter_rank=0 if adapter is None else adapter.rank)
    student = Student(config, info, config.max_positions, device, recipe.seed)
    if start is not None:
        student.load({name: start.tensors.read(name, torch.float32) for name in student.parameters})
    out = plan.out
    out.mkdir(parents=True, exist_ok=True)
    began = "random weights"
    if plan.start_from is not None:
        began = hashlib.sha256(plan.start_from.read_bytes()).hexdigest()
    if plan.minutes is not None:
        base = base_fingerprint(source)

        def trial(own: Recipe, folder: Path) -> Trainer:
            copy = Student(config, info, config.max_positions, device, recipe.seed)
            copy.load({name: p.detach() for name, p in student.parameters.items()})
            return Trainer(trunk, copy, splits["train"], own, folder, base, began, ranks=ranks)

        recipe = _fitted(recipe, plan.minutes, out / "recipe.json", trial, ranks, device)
    trainer = Trainer(
        trunk, student, splits["train"], recipe, out, base_fingerprint(source), began, adapter, ranks
    )
    console = Console(quiet=ranks.rank > 0)
    if trainer.resume():
        console.print(f"resuming at step {trainer.step} of {recipe.total_steps}", highlight=False)

    most = max(LEAST_TOP_K, plan.default_top_k)

    def table(per_kind: int, *, baselines: bool) -> dict[str, dict[str, float]]:
        return held_out(
            trunk, student, splits["heldout"], device, per_kind=per_kind, baselines=baselines, adapter=adapter,
            index_top_k=(most // 2, most), max_length=8 * most, beyond=2 * most,
        )  # fmt: skip

    with TrainingReport(console, trainer.step, recipe.total_steps) as report:

        def show(log: StepLog) -> None:
            report.step(log)
            if plan.evaluate_every and log.step and log.step % plan.evaluate_every == 0:
                for line in _lines(table(1, baselines=False), 2 * most):
                    report.say(line)

        stopped = _train(trainer, show, plan.until)
    part(ranks, device)
    if ranks.rank > 0:
        return 0
    if stopped:
        report.say(f"stopped at step {trainer.step}; the same command goes on from there")
        return STOPPED
    from lab.distill.plot import plot_log

    plot_log(out / "log.jsonl", out / "loss.png", recipe.report_top_k)
    _write(out / "indexer.safetensors", trainer, info, recipe, source, start)
    if plan.evaluate_kind > 0:
        figures = table(plan.evaluate_kind, baselines=True)
        (out / "evaluation.json").write_text(json.dumps(figures, indent=1))
        for line in _lines(figures, 2 * most):
            report.say(line)
    report.say(f"to serve it: dsa serve {plan.weights} --overlay {out / 'indexer.safetensors'}")
    return 0


def _fitted(
    recipe: Recipe, minutes: float, path: Path, trial: Callable[[Recipe, Path], Trainer], ranks: Ranks,
    device: torch.device,
) -> Recipe:  # fmt: skip
    """Return the recipe with as many steps as fit into the time; a run that continues keeps what it began with.

    Raises:
        ConfigError: the recipe trains an adapter, whose steps are not timed.
    """
    if recipe.adapt_steps:
        raise ConfigError("--minutes fits dense and sparse steps only; leave it out, or adapt_steps")
    if path.is_file():
        return read_recipe(path.read_text())
    made = fitted(recipe, 60 * minutes, trial)
    # Each rank has timed its own steps; rank 0's count.
    steps = torch.tensor([made.warmup_steps, made.sparse_steps], device=device) * (ranks.rank == 0)
    dense, sparse = (int(number) for number in ranks.sum(steps.float()))
    made = msgspec.structs.replace(made, warmup_steps=dense, sparse_steps=sparse)
    if ranks.rank == 0:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1))
    return made


def _adapter(
    recipe: Recipe, config: GqaConfig, device: torch.device, start: Overlay | None, *, drop: bool
) -> Adapter | None:
    """Return the adapter that the last stage trains: a new one, or that of the overlay `start`; None without that stage.

    Raises:
        ConfigError: the overlay's adapter has another rank, or the recipe would train the indexers but not the
            adapter that suits them.
    """
    before = 0 if start is None or drop else start.info.adapter_rank
    if not recipe.adapt_steps:
        if before:
            raise ConfigError(
                "the overlay to start from has an adapter, which suits its indexers only; add adapt_steps to the recipe, "
                "or train the indexers without it: --drop-adapter"
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


def _indexer(plan: DistillPlan) -> IndexerInfo:
    """Return the indexer's sizes. They are checked now, because writing the overlay comes after all the work."""
    heads, dim, rope = (
        asked or usual for asked, usual in zip((plan.heads, plan.dim, plan.rope), _SIZES, strict=True)
    )
    if rope % 2 or rope > dim:
        raise ConfigError(f"--rope is {rope}; expected an even number up to --dim ({dim})")
    return IndexerInfo(
        num_heads=heads,
        head_dim=dim,
        rope_dim=rope,
        default_index_top_k=plan.default_top_k,
        source="indexer.safetensors",
    )


def _same_sizes(info: IndexerInfo, plan: DistillPlan) -> IndexerInfo:
    """Return the info of the indexer that training starts from, with this run's default top_k.

    Raises:
        ConfigError: a flag asks for other sizes than this indexer has.
    """
    sizes = {"heads": info.num_heads, "dim": info.head_dim, "rope": info.rope_dim}
    for flag, value in sizes.items():
        if getattr(plan, flag) not in (value, None):
            raise ConfigError(
                f"--{flag} is {getattr(plan, flag)}, but {plan.start_from} has {value}; leave the flag out"
            )
    return msgspec.structs.replace(info, default_index_top_k=plan.default_top_k, source="indexer.safetensors")


def _train(trainer: Trainer, show: Callable[[StepLog], None], until: int | None) -> bool:
    """Run the trainer; return whether a signal ended it early. After the first signal the step still ends."""
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
    """Write the overlay, with the recipe and, if it was trained from another overlay, that overlay's recipe."""
    made: dict[str, object] = {"recipe": json.loads(msgspec.json.encode(recipe)), "steps": trainer.step}
    if start is not None:
        made["start"] = json.loads(start.recipe)
    tensors = {
        name: p.detach() if p.dim() == 2 else p.detach().half() for name, p in trainer.parameters().items()
    }
    write_overlay(path, tensors, info, json.dumps(made), source, eight_bit=True)


def _lines(table: dict[str, dict[str, float]], beyond: int) -> list[str]:
    """Format an evaluation: for each selection its loss, and its difference to dense for each kind of text."""
    if not table:
        return [
            f"nothing evaluated: that takes held-out sequences, and room in the model, of {2 * beyond} tokens"
        ]
    lines = [f"held-out loss beyond position {beyond}, nats, and by kind of text above dense:"]
    for name, row in table.items():
        above = "  ".join(f"{kind} {value - table['dense'][kind]:+.4f}" for kind, value in row.items())
        lines.append(f"{name:12} {row['all']:.4f}   {above}")
    return lines
