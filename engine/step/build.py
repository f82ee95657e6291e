"""Builds a running core from an `EngineConfig`: opens the checkpoint, loads the model, makes cache and scheduler.

More than 400 lines, because the parts of an engine meet here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from engine.attention.precision import Precision
from engine.checkpoint.loader import LoadReport
from engine.checkpoint.overlay import Overlay, read_overlay
from engine.checkpoint.random_weights import RandomSource
from engine.checkpoint.safetensors import read_object
from engine.checkpoint.source import Source, open_source
from engine.config import PAGE_SIZE, EngineConfig
from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.choice import choose_backend
from engine.memory.planes import PagedCache, page_bytes
from engine.models import read_config, read_model
from engine.models.family import STEP_SCORE_BYTES, Family, KernelCompilers, Model, Placement, RowStep
from engine.parallel.link import Progress
from engine.parallel.ranks import ALONE, Ranks
from engine.parallel.team import OnLost, Team
from engine.plan.cost import CostModel, assumed_coefficients, read_calibration
from engine.plan.meter import Meter
from engine.plan.pace import CostPace
from engine.plan.scheduler import Scheduler
from engine.protocol import Capacity, ModelInfo, Ready, Vocabulary
from engine.step.core import EngineCore, StepRunner
from engine.step.drafting import LayerDrafter
from engine.step.grammars import Grammars
from engine.step.lead import LeadRunner
from engine.step.runner import Runner
from engine.step.sampler import Draw, sample
from engine.step.sizes import num_pages, sizes_of


@dataclass(frozen=True)
class Built:
    """An engine that is ready to step, and a description of it."""

    core: EngineCore
    runner: Runner
    ahead: StepRunner | None  # what the core runs in place of `runner`: it takes plans ahead
    cache: PagedCache
    costs: CostModel
    ready: Ready
    unused_tensors: tuple[str, ...]
    weights: LoadReport  # the main model's
    backend: str  # name of the backend that computes the model's steps
    kernels: str  # for the log: what computes each operation
    team: Team | None = None  # the other ranks

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self.team is not None:
            self.team.close()


@dataclass(frozen=True)
class RankPart:
    """A rank's part of the model, with its own cache, which has all tokens."""

    runner: Runner
    report: LoadReport


@dataclass(frozen=True)
class _Opened:
    """A checkpoint, and the device and dtype to compute with, before weights are loaded."""

    source: Source
    family: Family
    overlay: Overlay | None
    device: torch.device
    dtype: torch.dtype
    max_model_len: int


def build(
    config: EngineConfig,
    progress: Progress = lambda stage, done, total: None,
    on_lost: OnLost | None = None,
    vocabulary: Vocabulary | None = None,
) -> Built:
    """Load everything that `config` names, in this process and in the other ranks if there are any.

    Args:
        config: what to load and how
        progress: gets the progress of this process
        on_lost: called from a thread when another rank has ended; see `engine.parallel.team.OnLost`
        vocabulary: what grammars are about; None: requests cannot have one

    Raises:
        CheckpointError: the model's files are missing, damaged or of an unknown architecture.
        ConfigError: a setting does not fit the model or the machine.
        RankError: another rank failed.
    """
    opened = _open(config, 0, progress)
    if config.tensor_parallel == 1:
        return _build(config, opened, progress, ALONE, None, vocabulary)
    # Decide `auto` here, so that all ranks use the same values.
    settled = msgspec.structs.replace(
        config, device=opened.device.type, dtype=str(opened.dtype).removeprefix("torch.")
    )
    team = Team(settled, on_lost, progress)
    try:
        built = _build(config, opened, progress, team.join(opened.device), team, vocabulary)
        team.wait_loaded()
    except BaseException:
        team.close()
        raise
    return built


def load_part(config: EngineConfig, rank: int, join: Callable[[torch.device], Ranks]) -> RankPart:
    """Load the part of the model of a rank other than 0.

    Args:
        config: the engine's
        rank: 1 to `config.tensor_parallel` - 1
        join: joins the other ranks, given this rank's device

    Raises:
        EngineError: the same errors as in `build`.
    """
    opened = _open(config, rank, lambda stage, done, total: None)
    model, report = _load(config, opened, lambda stage, done, total: None, join(opened.device))
    specs = model.plane_specs()
    # At least as many pages as rank 0, whose pages hold the same or also a draft layer.
    pages = num_pages(
        config,
        opened.device,
        page_bytes(specs, model.num_layers),
        opened.max_model_len,
        sizes_of(config, opened.device).max_running,
    )
    cache = PagedCache(pages, specs, model.num_layers, opened.device)
    costs = model.tile_costs(config.score_budget_bytes, config.sparse_form)
    return RankPart(Runner(model, cache, costs, opened.device), report)


def _open(config: EngineConfig, rank: int, progress: Progress) -> _Opened:
    count = config.devices_a_node
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device, rank % count, count)
    if config.threads is None and count > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    native.set_threads(torch.get_num_threads())
    progress("opening the checkpoint", 0, 1)
    source, family = _source(config, device)
    family.check_split(config.tensor_parallel)
    overlay = None if config.overlay is None else read_overlay(Path(config.overlay), source)
    if config.max_model_len is not None and config.max_model_len > family.max_positions:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but this checkpoint has {family.max_positions} positions; "
            "ask for no more than that"
        )
    return _Opened(
        source,
        family,
        overlay,
        device,
        resolve_dtype(
            config.dtype, device, compiled=family.compiled_steps and config.kernels in ("auto", "native")
        ),
        config.max_model_len or family.max_positions,
    )


def _source(config: EngineConfig, device: torch.device) -> tuple[Source, Family]:
    """Open the checkpoint that the config names, or one of random weights."""
    path = Path(config.weights)
    if config.load_format == "auto":
        source = open_source(path)
        return source, read_model(source)
    if not path.is_dir():
        raise ConfigError(f"load_format is dummy, which reads a folder with config.json; {path} is no folder")
    raw = read_object(path / "config.json")
    family = read_config(raw, str(path / "config.json"))
    shape = family.shape(None)
    return RandomSource(raw, [*shape.table.values(), *shape.mtp.values()], device), family


def _load(
    config: EngineConfig, opened: _Opened, progress: Progress, ranks: Ranks
) -> tuple[Model, LoadReport]:
    source, overlay = opened.source, opened.overlay
    return opened.family.build(
        source if overlay is None else overlay.over(source),
        None if overlay is None else overlay.info,
        _placement(config, opened, ranks),
        lambda done, total: progress("loading weights", done, total),
    )


def _placement(config: EngineConfig, opened: _Opened, ranks: Ranks) -> Placement:
    return Placement(
        choose_backend(config.kernels, opened.device),
        opened.max_model_len,
        opened.dtype,
        opened.device,
        Precision(config.kv_cache_dtype, config.indexer_dtype, config.weight_dtype),
        ranks,
        config.batch_invariant,
    )


def _build(
    config: EngineConfig,
    opened: _Opened,
    progress: Progress,
    ranks: Ranks,
    team: Team | None,
    vocabulary: Vocabulary | None,
) -> Built:
    device, dtype, max_model_len = opened.device, opened.dtype, opened.max_model_len
    kernels = choose_backend(config.kernels, device)
    compilers = _compilers() if kernels.name == "triton" and device.type == "cuda" else None
    model, report = _load(config, opened, progress, ranks)
    specs, num_layers, unused = model.plane_specs(), model.num_layers, report.unused
    layer = None
    if config.drafter == "mtp":
        layer, names = opened.family.build_draft(
            opened.source,
            _placement(config, opened, ranks),
            lambda done, total: progress("loading the draft layer", done, total),
        )
        specs, num_layers = layer.plane_specs(specs), num_layers + 1
        unused = tuple(name for name in unused if name not in names)
    size = page_bytes(specs, num_layers)
    sizes = sizes_of(config, device)
    pages = num_pages(config, device, size, max_model_len, sizes.max_running)
    cache = PagedCache(pages, specs, num_layers, device)
    score_bytes = config.score_budget_bytes
    if model.row_step is not None:
        score_bytes = max(score_bytes, STEP_SCORE_BYTES)
    costs = model.tile_costs(score_bytes, config.sparse_form)
    rows = sizes.max_running * (1 if layer is None else 1 + config.draft_tokens)
    model.prepare(cache, rows, lambda done, total: progress("capturing graphs", done, total), compilers)
    if layer is not None:
        layer.prepare(
            cache,
            rows,
            lambda done, total: progress("capturing the draft layer's graphs", done, total),
            compilers,
        )
    step = model.row_step if team is None and not config.draft_tokens else None
    masks = vocabulary is not None
    draw: Draw = sample
    if kernels.name == "triton":
        at_once = 0 if step is not None else sizes.max_running * (1 + config.draft_tokens)
        draw = _device_draw(model.vocab_size, at_once, device, compilers, masks=masks)
    drafter = None if layer is None else LayerDrafter(layer, config.draft_tokens, cache, costs, draw)
    runner = (
        Runner(model, cache, costs, device, drafter, draw)
        if team is None
        else LeadRunner(model, cache, costs, device, drafter, draw, team)
    )
    ahead = None
    if step is not None:
        ahead = _device_runner(model, step, cache, score_bytes, device, compilers, masks=masks)
    if compilers is not None:
        compilers.started()
        compilers.close()
    shape, dtype_name = model.shape(), str(dtype).removeprefix("torch.")
    coefficients = assumed_coefficients(shape, device.type, model.backend)
    if config.cost_calibration is not None:
        calibration = read_calibration(Path(config.cost_calibration))
        calibration.check(shape, device.type, dtype_name, model.backend)
        coefficients = calibration.coefficients
    cost_model = CostModel(shape, coefficients, costs)
    scheduler = Scheduler(
        pages,
        token_budget=sizes.token_budget,
        max_running=sizes.max_running,
        max_model_len=max_model_len,
        prefix_caching=config.prefix_caching,
        draft_tokens=config.draft_tokens,
        lookup=config.drafter == "ngram",
        pace=CostPace(cost_model),
    )
    ready = Ready(
        model=ModelInfo(
            architecture=model.architecture,
            num_layers=model.num_layers,
            num_parameters=model.num_parameters,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            device=str(device),
            dtype=dtype_name,
            indexer=model.indexer,
            random_weights=config.load_format == "dummy",
            cost_model="assumed" if config.cost_calibration is None else "measured",
            batch_invariant=config.batch_invariant,
        ),
        capacity=Capacity(
            num_pages=pages,
            page_size=PAGE_SIZE,
            page_bytes=size,
            token_budget=sizes.token_budget,
            max_running=sizes.max_running,
        ),
    )
    core = EngineCore(
        scheduler,
        ahead or runner,
        Meter(cost_model),
        sparse=model.indexer is not None,
        grammars=None if vocabulary is None else Grammars(vocabulary, model.vocab_size),
        late_masks=ahead is None and draw is sample,
    )
    return Built(
        core=core,
        runner=runner,
        ahead=ahead,
        cache=cache,
        costs=cost_model,
        ready=ready,
        unused_tensors=tuple(unused),
        weights=report,
        backend=model.backend,
        kernels=_described(model, _sampling(draw, ahead)),
        team=team,
    )


def _described(model: Model, sampling: str) -> str:
    """Name every operation of a step, those together that the same code computes."""
    together: dict[str, list[str]] = {}
    for operation, what in (model.computed_by() | {"sampling": sampling}).items():
        together.setdefault(what, []).append(operation)
    return "kernels: " + "; ".join(f"{', '.join(names)}: {what}" for what, names in together.items())


def _sampling(draw: Draw, ahead: StepRunner | None) -> str:
    """What draws tokens. Without a runner ahead of the host, penalties are counted on the host."""
    if ahead is not None:
        return "Triton, the usual ways as CUDA graphs"
    return "torch" if draw is sample else "Triton, with penalties torch"


def _device_draw(
    vocab: int, rows: int, device: torch.device, compilers: KernelCompilers | None, *, masks: bool
) -> Draw:
    from engine.step.device_draws import given_draws  # needs Triton

    return given_draws(vocab, rows, device, compilers, masks=masks)


def _compilers() -> KernelCompilers:
    from engine.kernels.triton.compiling import Compilers  # needs Triton

    return Compilers()


def _device_runner(
    model: Model,
    step: RowStep,
    cache: PagedCache,
    budget_bytes: int,
    device: torch.device,
    compilers: KernelCompilers | None,
    *,
    masks: bool,
) -> StepRunner:
    from engine.step.device_runner import DeviceRunner  # needs Triton

    runner = DeviceRunner(model, step, cache, budget_bytes, device)
    runner.prepare(compilers, masks=masks)
    return runner


def resolve_device(name: str, rank: int = 0, count: int = 1) -> torch.device:
    """Return the device of a rank. `auto` is CUDA if there is any, else the CPU. On CUDA rank n gets device n.

    Raises:
        ConfigError: this machine does not have the device, or has fewer than `count` of them.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        seen = torch.cuda.device_count()
        if (device.index or 0) >= seen:
            raise ConfigError(
                f"device {name!r} was asked for, but torch sees {seen} CUDA devices; try --device cpu"
            )
        if count > 1:
            return _nth_cuda(device, rank, count)
        return torch.device("cuda", device.index or 0)
    return device


def _nth_cuda(device: torch.device, rank: int, count: int) -> torch.device:
    if device.index is not None:
        raise ConfigError(
            f"device {str(device)!r} is one device, but tensor_parallel is {count}; use --device cuda and choose "
            "the devices with CUDA_VISIBLE_DEVICES"
        )
    if count > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel is {count}, but torch sees {torch.cuda.device_count()} CUDA devices; ask for no more"
        )
    return torch.device("cuda", rank)


def resolve_dtype(name: str, device: torch.device, *, compiled: bool = False) -> torch.dtype:
    """Return the dtype to compute in.

    Args:
        name: `float32`, `bfloat16` or `auto`: bfloat16 where that is faster, else float32
        compiled: whether the compiled kernels do the model's steps, on a CPU (`Family.compiled_steps`). They are faster in
            bfloat16 on any processor; torch only on one that multiplies bfloat16
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    fast = device.type == "cuda" or cpu_multiplies_bfloat16() or (compiled and native.library() is not None)
    return torch.bfloat16 if fast else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU. If it does not, torch is slower in bfloat16 than in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
