"""An engine without a model: it answers each request as its script says, and records the requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from engine.client import EngineState, EngineStatus, Hear, Settled
from engine.errors import EngineDiedError, EngineUnavailableError
from engine.protocol import (
    Capacity,
    Delta,
    EngineStats,
    FinishReason,
    IndexerInfo,
    Loading,
    ModelInfo,
    RequestUsage,
    Submit,
    TokenLogprob,
    Work,
)

Fault = Literal["error", "abort", "die", "refuse", "crash"]


@dataclass
class Script:
    """What to do with a request.

    Attributes:
        token_ids: what is generated, as far as the request's limit and stop tokens allow.
        group: how many tokens a delta has.
        first_delay: seconds before the first delta.
        delay: seconds before each later one.
        cached: prompt tokens that the usage reports as reused.
        fault: what goes wrong after `fault_after` tokens.
        message: of the fault `error`.
        work: the work that the usage reports.
    """

    token_ids: Sequence[int] = ()
    group: int = 1
    first_delay: float = 0.0
    delay: float = 0.0
    cached: int = 0
    fault: Fault | None = None
    fault_after: int = 0
    message: str = "the sampler met NaN logits"
    work: Work = field(default_factory=Work)


@dataclass
class FakeEngine:
    """Implements `engine.client.Engine`."""

    script: Callable[[Submit], Script] = field(default=lambda submit: Script())
    vocab_size: int = 300
    max_model_len: int = 256
    default_top_k: int | None = 32
    ready: bool = True

    def __post_init__(self) -> None:
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.started = self.stopped = False
        indexer = None
        if self.default_top_k is not None:
            indexer = IndexerInfo(
                num_heads=2,
                head_dim=8,
                rope_dim=4,
                default_index_top_k=self.default_top_k,
                source="fake.safetensors",
            )
        model = ModelInfo(
            architecture="fake",
            num_layers=1,
            num_parameters=1,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            device="cpu",
            dtype="float32",
            indexer=indexer,
        )
        capacity = Capacity(num_pages=8, page_size=64, page_bytes=1, token_budget=64, max_running=8)
        self._status = EngineStatus(state=EngineState.READY, model=model, capacity=capacity, pid=1)
        if not self.ready:
            self._status = EngineStatus(
                state=EngineState.STARTING,
                message="the engine is loading the model",
                loading=Loading(stage="weights", done=1, total=4),
            )

    @property
    def status(self) -> EngineStatus:
        return self._status

    def set_status(self, **changes: object) -> None:
        self._status = msgspec.structs.replace(self._status, **changes)

    def set_stats(self, **changes: Any) -> None:
        self.set_status(stats=EngineStats(**changes))

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.stopped = True

    def submit(self, request: Submit, hear: Hear, settled: Settled | None = None) -> None:
        script = self.script(request)
        if script.fault == "refuse":
            if settled is not None:
                settled(request.request_id, None)
            raise EngineUnavailableError("the engine takes no requests now; try again later")
        self.submitted.append(request)
        usages: list[RequestUsage | None] = [None]
        task = self._tasks[request.request_id] = asyncio.create_task(self._run(request, script, hear, usages))
        if settled is not None:  # also if the task was cancelled before it ran
            task.add_done_callback(lambda task: settled(request.request_id, usages[-1]))

    def abort(self, request_id: str) -> None:
        if (task := self._tasks.pop(request_id, None)) is not None:
            self.aborted.append(request_id)
            task.cancel()

    async def _run(
        self, request: Submit, script: Script, hear: Hear, usages: list[RequestUsage | None]
    ) -> None:
        try:
            async for delta in self._deltas(request, script):
                usages.append(delta.usage or usages[-1])
                if delta.finish_reason is not None:
                    self.finished.append(request.request_id)
                    del self._tasks[request.request_id]
                hear(delta)
        except Exception as error:
            del self._tasks[request.request_id]
            self.aborted.append(request.request_id)
            hear(error)

    async def _deltas(self, request: Submit, script: Script) -> AsyncGenerator[Delta, None]:
        token_ids, reason = _cut(request, script)
        limit = len(token_ids) if script.fault is None else min(len(token_ids), script.fault_after)
        prompt_logprobs = _prompt_logprobs(request)
        for start in range(0, max(limit, 1), script.group):
            await asyncio.sleep(script.delay if start else script.first_delay)
            stop = min(start + script.group, limit)
            last = script.fault is None and stop == limit
            if stop == start and not last:
                break
            yield Delta(
                request_id=request.request_id,
                token_ids=tuple(token_ids[start:stop]),
                logprobs=_logprobs(request, token_ids[start:stop]),
                prompt_logprobs=prompt_logprobs if not start else None,
                finish_reason=reason if last else None,
                usage=_usage(request, script, stop) if last or not start else None,
            )
        await asyncio.sleep(0)
        if script.fault == "die":
            raise EngineDiedError("the engine died while this request ran; send it again")
        if script.fault == "crash":
            raise RuntimeError("a secret of the engine")
        if script.fault in ("error", "abort"):
            message = script.message if script.fault == "error" else None
            yield Delta(
                request_id=request.request_id,
                finish_reason=script.fault,
                error=message,
                usage=_usage(request, script, limit),
            )


def _cut(request: Submit, script: Script) -> tuple[list[int], FinishReason]:
    token_ids: list[int] = []
    for token_id in script.token_ids:
        token_ids.append(token_id)
        if token_id in request.sampling.stop_token_ids:
            return token_ids, "stop"
        if len(token_ids) == request.sampling.max_tokens:
            break
    return token_ids, "length"


def _entry(token_id: int, alternatives: int) -> TokenLogprob:
    top = tuple((token_id + i, -0.5 - i) for i in range(alternatives))
    return TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, top=top)


def _logprobs(request: Submit, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...] | None:
    alternatives = request.sampling.logprobs
    return None if alternatives is None else tuple(_entry(token_id, alternatives) for token_id in token_ids)


def _prompt_logprobs(request: Submit) -> tuple[TokenLogprob | None, ...] | None:
    alternatives = request.sampling.prompt_logprobs
    if alternatives is None:
        return None
    start = max(1, request.sampling.prompt_logprobs_start)
    scored = (_entry(token_id, alternatives) for token_id in request.prompt_token_ids[start:])
    return (*(None for _ in request.prompt_token_ids[:start]), *scored)


def _usage(request: Submit, script: Script, completion_tokens: int) -> RequestUsage:
    return RequestUsage(
        prompt_tokens=len(request.prompt_token_ids),
        cached_tokens=script.cached,
        completion_tokens=completion_tokens,
        preemptions=0,
        index_top_k=request.index_top_k,
        queue_seconds=0.001,
        prefill_seconds=0.001,
        decode_seconds=0.001,
        work=script.work,
    )
