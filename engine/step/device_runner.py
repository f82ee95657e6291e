"""Runs plans on a device ahead of the host: a step's tokens stay there, so the next step can be launched at once.

A plan that is made before the tokens of the step before it are known has `PENDING` in their place. The runner knows in
which row of `drawn` the device keeps each of them. What the host does with a step is one copy of its rows, one graph, one
copy of how its tokens are drawn, one graph, and one copy back, which it waits for only in `result`.

A plan's draw may wait for masks, which depend on the tokens before it (`engine.step.masking`). Its rows are computed meanwhile.

Every stage is launched on one stream, so plans are computed in the order in which they are launched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from engine.attention.batch import Batch, PageTables, build_batch
from engine.errors import EngineError
from engine.memory.planes import PagedCache
from engine.models.family import KernelCompilers, Model, RowStep
from engine.plan.types import PENDING, Sampled, SampleSpec, ScheduledRequest, StepPlan, StepResult
from engine.step.device_draws import DeviceDraws, Told
from engine.step.faults import with_flaws
from engine.step.masking import TokenMasks
from engine.step.sampler import prompt_logprobs

_CPU = torch.device("cpu")


class DeviceRunner:
    """One model and its cache on one device."""

    ahead = True

    def __init__(
        self, model: Model, step: RowStep, cache: PagedCache, budget_bytes: int, device: torch.device
    ) -> None:
        """Nothing is in flight.

        Args:
            model: the model
            step: its step over rows; `drawn` has a place for every request of a step
            cache: the model's
            budget_bytes: that the scores of a step's rows may take
            device: the model's
        """
        self.model = model
        self._step, self._cache = step, cache
        self._budget_bytes, self._device = budget_bytes, device
        self._draws = DeviceDraws(step, model.vocab_size, device)
        self._tables = PageTables()
        self._places: dict[str, int] = {}  # of the last step's requests in `drawn`
        self._held = False  # the last plan's tokens are not drawn yet

    def prepare(self, compilers: KernelCompilers | None = None, *, masks: bool = False) -> None:
        """Capture the graphs that draw, on CUDA; `masks`: also those that draw under masks."""
        if self._device.type == "cuda":
            self._draws.capture(self._step.hidden_like(), compilers, masks=masks)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan and wait for its tokens."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, masks: TokenMasks | None = None, *, hold: bool = False) -> DeviceFlight:
        """Begin to compute a plan.

        Args:
            plan: what to compute
            masks: which tokens may be drawn; None: any
            hold: draw nothing before the flight's `draw`, which has to come before the next launch

        Raises:
            EngineError: it has drafts, or a pending token that the last plan did not draw; or the last plan is held.
        """
        if self._held:
            raise EngineError("the plan before this one waits for its masks")
        if plan.wiped_pages:
            self._cache.wipe(plan.wiped_pages)
        batch = build_batch(plan, _CPU, self._tables)
        self._tables.turn()
        rows: list[int] = []
        specs: list[SampleSpec] = []
        places: dict[str, int] = {}
        scored: list[tuple[int, Tensor]] = []
        tokens = batch.token_ids.numpy()
        end = 0
        for request in plan.requests:
            end += len(request.token_ids)
            if request.token_ids[-1] == PENDING:
                tokens[end - 1] = -1 - self._place(request)
            if request.sample is not None:
                if request.num_drafts:
                    raise EngineError("a device runner takes no drafts")
                places[request.request_id] = len(rows)
                rows.append(end - 1)
                specs.append(request.sample)
        hidden = self._step.forward(batch, self._cache, self._budget_bytes)
        end = 0
        for number, request in enumerate(plan.requests):
            first, end = end, end + len(request.token_ids)
            if request.prompt_targets:  # later steps may overwrite the hidden states
                scored.append((number, hidden[first : first + len(request.prompt_targets)].clone()))
        self._places = places

        def draw(masks: TokenMasks | None) -> Told | None:
            self._held = False
            return self._draws.draw(hidden, rows, specs, list(places), masks) if rows else None

        self._held = hold
        flight = DeviceFlight(self.model, plan, batch, draw, scored, self._device)
        if not hold:
            flight.draw(masks)
        return flight

    def _place(self, request: ScheduledRequest) -> int:
        try:
            return self._places[request.request_id]
        except KeyError:
            raise EngineError(
                f"request {request.request_id!r} has a pending token that no step drew"
            ) from None


class DeviceFlight:
    """A plan that a device computes."""

    def __init__(
        self,
        model: Model,
        plan: StepPlan,
        batch: Batch,
        draw: Callable[[TokenMasks | None], Told | None],
        scored: Sequence[tuple[int, Tensor]],
        device: torch.device,
    ) -> None:
        self._model, self._plan, self._draw, self._scored, self._device = model, plan, draw, scored, device
        self._batch = batch
        self._told: Told | None = None
        self._done: torch.cuda.Event | None = None

    @torch.inference_mode()
    def draw(self, masks: TokenMasks | None) -> None:
        """Launch the drawing of the plan's tokens."""
        self._told = self._draw(masks)
        if self._told is None and self._device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    @torch.inference_mode()
    def result(self) -> StepResult:
        """Wait for the tokens."""
        if self._done is not None:
            self._done.synchronize()
        sampled: list[Sampled] = []
        drawn = iter(() if self._told is None else self._told.drawn())
        if not self._scored and len(self._plan.requests) == (0 if self._told is None else len(self._told)):
            return StepResult(sampled=with_flaws(self._batch, tuple(drawn)))
        for request in self._plan.requests:
            if request.sample is None:
                sampled.append(_NOTHING)
                continue
            sampled.append(next(drawn))
        for number, hidden in self._scored:
            request = self._plan.requests[number]
            sampled[number] = msgspec.structs.replace(
                sampled[number],
                prompt_logprobs=prompt_logprobs(
                    self._model.logits, hidden, request.prompt_targets, request.prompt_alternatives
                ),
            )
        return StepResult(sampled=with_flaws(self._batch, sampled))


_NOTHING = Sampled()
