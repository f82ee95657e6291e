"""From an `EngineConfig` to a running core: checkpoint, model, cache, scheduler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from engine.attention.precision import Precision
from engine.checkpoint.loader import LoadReport
from engine.checkpoint.overlay import Overlay, read_overlay
from engine.checkpoint.source import Source, open_source
from engine.config import PAGE_SIZE, EngineConfig
from engine.errors import ConfigError
from engine.kernels import native
from engine.kernels.choice import choose_backend
from engine.memory.planes import PagedCache, page_bytes
from engine.models import build_model, check_split
from engine.models.family import Model
from engine.parallel.ranks import ALONE, Ranks
from engine.parallel.team import OnLost, Team
from engine.plan.cost import CostModel, assumed_coefficients, read_calibration
from engine.plan.meter import Meter
from engine.plan.pace import CostPace
from engine.plan.scheduler import Scheduler
from engine.protocol import Capacity, ModelInfo, Ready
from engine.step.core import EngineCore
from engine.step.drafting import LayerDrafter
from engine.step.lead import LeadRunner
from engine.step.runner import Runner

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while a model loads."""


@dataclass(frozen=True)
class Built:
    """An engine that is ready to step, and what it is."""

    core: EngineCore
    runner: Runner
    cache: PagedCache
    costs: CostModel
    ready: Ready
    unused_tensors: tuple[str, ...]
    weights: LoadReport  # of the main model
    backend: str  # name of what computes attention
    kernels: str  # the same as a sentence for the log
    team: Team | None = None  # the other ranks

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self.team is not None:
            self.team.close()


@dataclass(frozen=True)
class Part:
    """A rank's part of the model, and its own cache of all tokens."""

    runner: Runner
    report: LoadReport


@dataclass(frozen=True)
class _Opened:
    """A checkpoint and where it is to be computed, before anything was loaded."""

    source: Source
    overlay: Overlay | None
    device: torch.device
    dtype: torch.dtype
    max_model_len: int


def build(
    config: EngineConfig,
    progress: Progress = lambda stage, done, total: None,
    on_lost: OnLost | None = None,
) -> Built:
    """Load everything that `config` names, in this process and, if it says so, in others.

    Args:
        config: what to load and how
        progress: of this process
        on_lost: called, from a thread, when another process of the engine has ended; see `Team`

    Raises:
        CheckpointError: the model's files.
        ConfigError: settings that do not fit the model or the machine.
        RankError: another process failed.
    """
    opened = _open(config, 0, progress)
    if config.tensor_parallel == 1:
        return _build(config, opened, progress, ALONE, None)
    # What is `auto` is settled here, for all ranks.
    settled = msgspec.structs.replace(
        config, device=opened.device.type, dtype=str(opened.dtype).removeprefix("torch.")
    )
    team = Team(settled, on_lost, progress)
    try:
        built = _build(config, opened, progress, team.join(opened.device), team)
        team.wait_loaded()
    except BaseException:
        team.close()
        raise
    return built


def load_part(config: EngineConfig, rank: int, join: Callable[[torch.device], Ranks]) -> Part:
    """What a rank other than 0 computes with.

    Args:
        config: the engine's
        rank: 1 to `config.tensor_parallel` - 1
        join: meets the other ranks, given this one's device

    Raises:
        EngineError: as `build`.
    """
    opened = _open(config, rank, lambda stage, done, total: None)
    model, report = _load(config, opened, lambda stage, done, total: None, join(opened.device))
    specs = model.plane_specs()
    # At least as many pages as rank 0 has, whose pages hold the same or a draft layer more.
    num_pages = config.kv_cache_bytes // page_bytes(specs, model.num_layers)
    cache = PagedCache(num_pages, specs, model.num_layers, opened.device)
    costs = model.tile_costs(config.score_budget_bytes, config.sparse_form)
    return Part(Runner(model, cache, costs, opened.device), report)


def _open(config: EngineConfig, rank: int, progress: Progress) -> _Opened:
    count = config.devices_a_node
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device, rank % count, count)
    if config.threads is None and count > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    native.set_threads(torch.get_num_threads())
    progress("opening the checkpoint", 0, 1)
    source = open_source(Path(config.weights))
    check_split(source, config.tensor_parallel)
    overlay = None if config.overlay is None else read_overlay(Path(config.overlay), source)
    max_positions = int(source.config["max_position_embeddings"])
    if config.max_model_len is not None and config.max_model_len > max_positions:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but this checkpoint has {max_positions} positions; "
            "ask for no more than that"
        )
    return _Opened(
        source, overlay, device, resolve_dtype(config.dtype, device), config.max_model_len or max_positions
    )


def _load(
    config: EngineConfig, opened: _Opened, progress: Progress, ranks: Ranks
) -> tuple[Model, LoadReport]:
    source, overlay = opened.source, opened.overlay
    return build_model(
        source if overlay is None else overlay.over(source),
        None if overlay is None else overlay.info,
        choose_backend(config.kernels, opened.device),
        opened.max_model_len,
        dtype=opened.dtype,
        device=opened.device,
        progress=lambda done, total: progress("loading weights", done, total),
        precision=Precision(config.kv_cache_dtype, config.indexer_dtype, config.weight_dtype),
        ranks=ranks,
    )


def _build(
    config: EngineConfig, opened: _Opened, progress: Progress, ranks: Ranks, team: Team | None
) -> Built:
    source, device, dtype, max_model_len = opened.source, opened.device, opened.dtype, opened.max_model_len
    model, report = _load(config, opened, progress, ranks)
    specs, num_layers, unused = model.plane_specs(), model.num_layers, report.unused
    layer = None
    if config.drafter == "mtp":
        if not source.config.get("num_nextn_predict_layers"):
            raise ConfigError(
                "drafter is mtp, but this checkpoint has no multi-token prediction layer; use ngram or off"
            )
        from engine.models.mla.mtp import build_draft_layer

        layer, names = build_draft_layer(
            source,
            choose_backend(config.kernels, device),
            max_model_len,
            dtype=dtype,
            device=device,
            progress=lambda done, total: progress("loading the draft layer", done, total),
            precision=Precision(config.kv_cache_dtype, config.indexer_dtype, config.weight_dtype),
        )
        specs, num_layers = layer.plane_specs(specs), num_layers + 1
        unused = tuple(name for name in unused if name not in names)
    size = page_bytes(specs, num_layers)
    num_pages = config.kv_cache_bytes // size
    needed = -(-max_model_len // PAGE_SIZE)
    if num_pages < needed:
        raise ConfigError(
            f"the KV cache of {config.kv_cache_bytes} bytes holds {num_pages * PAGE_SIZE} tokens, but one request "
            f"may use {max_model_len}; give it at least {needed * size} bytes or lower max_model_len"
        )
    cache = PagedCache(num_pages, specs, num_layers, device)
    costs = model.tile_costs(config.score_budget_bytes, config.sparse_form)
    drafter = None if layer is None else LayerDrafter(layer, config.draft_tokens, cache, costs, device)
    runner = (
        Runner(model, cache, costs, device, drafter)
        if team is None
        else LeadRunner(model, cache, costs, device, drafter, team)
    )
    shape, dtype_name = model.shape(), str(dtype).removeprefix("torch.")
    kernels = choose_backend(config.kernels, device)
    coefficients = assumed_coefficients(shape, device.type, kernels.name)
    if config.cost_calibration is not None:
        calibration = read_calibration(Path(config.cost_calibration))
        calibration.check(shape, device.type, dtype_name, kernels.name)
        coefficients = calibration.coefficients
    cost_model = CostModel(shape, coefficients, costs)
    scheduler = Scheduler(
        num_pages,
        token_budget=config.token_budget,
        max_running=config.max_running,
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
            cost_model="assumed" if config.cost_calibration is None else "measured",
        ),
        capacity=Capacity(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            page_bytes=size,
            token_budget=config.token_budget,
            max_running=config.max_running,
        ),
    )
    core = EngineCore(scheduler, runner, Meter(cost_model), sparse=model.indexer is not None)
    return Built(
        core=core,
        runner=runner,
        cache=cache,
        costs=cost_model,
        ready=ready,
        unused_tensors=tuple(unused),
        weights=report,
        backend=kernels.name,
        kernels=f"{kernels.described(dtype)}; {model.products()}",
        team=team,
    )


def resolve_device(name: str, rank: int = 0, count: int = 1) -> torch.device:
    """`auto` is CUDA if there is any, else the CPU; on CUDA rank n has device n.

    Raises:
        ConfigError: no such device here, or fewer than `count`.
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


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float32 elsewhere."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.bfloat16 if device.type == "cuda" or _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products on this CPU; without them bfloat16 is slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
