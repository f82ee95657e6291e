"""How a generating endpoint answers: everything between the request's arrival and the last byte.

The engine takes or refuses a request at once. The headers of a stream are sent when the engine has taken the
request, and do not wait for the first token: a request may wait long in the queue, and proxies and clients want to
see that it was accepted. So a refusal is a plain HTTP error. A later failure is an `error` event, after which the
stream ends without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import EngineDiedError, EngineUnavailableError
from server.generation.admission import QueuePlace
from server.generation.choice import ChoiceUsage, TextDelta
from server.generation.generate import (
    Generation,
    GenerationAbortedError,
    GenerationFailedError,
    GrammarFailedError,
    QuietError,
)
from server.generation.render import total_usage
from server.http.access import caller_of
from server.http.deadline import DEADLINE, DeadlineError, deadline_of, seconds_of, too_late
from server.http.disconnect import ClientGoneError, unless_disconnected
from server.http.middleware import Record, outcome_of, record_of
from server.http.order import Later, Order
from server.http.outlet import Outlet
from server.http.protocol import sse
from server.http.protocol.errors import (
    ENGINE,
    ApiError,
    bad_request,
    draining,
    internal_error,
    unavailable,
)
from server.http.protocol.usage import CostUsage, Usage
from server.http.quota import Reservation, admission_errors, fitted, quota_errors, standing_headers
from server.money.accounting import Account, LedgerUnavailableError
from server.money.retries import attempt_name
from server.services import Services
from server.telemetry.metrics import GenerationMeter
from server.telemetry.record import GenerationRecord

logger = logging.getLogger("server.requests")

ACCEPT_SECONDS = 0.05
"""How long the headers of a stream wait for a refusal of the engine. The first token ends the wait."""

KEEP_ALIVE_SECONDS = 15.0


class GenerationReply(Response):
    """Reads a request, runs it and answers. All of this is one block, which cleans up whatever happens."""

    def __init__(self, services: Services, prepare: Callable[[Request], Awaitable[Order]]) -> None:
        super().__init__()
        self._services = services
        self._prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        services, record = self._services, record_of(scope)
        with services.lifecycle.track():
            if services.lifecycle.draining:
                raise draining()
            try:
                with admission_errors():
                    services.admission.check()
                request = Request(scope, receive)
                caller = caller_of(scope)
                order = await self._prepare(request)
                order = replace(order, work=fitted(order.work, caller))
                said = (
                    order.work.timeout,
                    services.live.config.request_seconds or None,
                    seconds_of(request.headers),
                )
                deadline = deadline_of(record.started, *said)
                attempt = attempt_name(
                    caller.name,
                    str(scope["path"]),
                    request.headers.get("idempotency-key"),
                    await request.body(),
                )
                work = self._admitted(order, record, send, scope, attempt, deadline)
                if order.later is None:
                    response = await unless_disconnected(receive, work)
                else:
                    services.background.start(order.later.response_id, self._apart(order.later, work))
                    queued = order.later.queued.model_dump_json(exclude_unset=True)
                    response = Response(queued, media_type="application/json")
            except (ClientDisconnect, ClientGoneError):
                record.outcome = "disconnected"
                logger.info("request %s: the client hung up", record.request_id)
                return
            if response is not None:
                await response(scope, receive, send)

    async def _admitted(
        self,
        order: Order,
        record: Record,
        send: Send,
        scope: Scope,
        attempt: str | None,
        deadline: float | None,
    ) -> Response | None:
        """Take a place and what the key allows, and generate."""
        caller, jobs = caller_of(scope), order.work.jobs
        tokens = sum(len(job.submit.prompt_token_ids) for job in jobs if not job.shares_prompt)
        sender = None if caller.record is None else caller.name
        with (
            admission_errors(),
            self._services.admission.admit(len(jobs), sender, tokens) as place,
            self._reserved(order, record) as reservation,
        ):
            return await self._run(order, record, send, scope, place, attempt, reservation, deadline)

    async def _apart(self, later: Later, work: Coroutine[Any, Any, Response | None]) -> None:
        """Generate in the background. The renderer stores the response."""
        with self._services.lifecycle.track():
            try:
                await work
            except ApiError as error:
                later.failed(error)
            except Exception as error:
                logger.error("the background response %s failed", later.response_id, exc_info=error)
                later.failed(internal_error())

    @contextmanager
    def _reserved(self, order: Order, record: Record) -> Iterator[Reservation]:
        """Reserve what the request may use of its key's limits, and say in the headers what is left then."""
        services, key = self._services, record.caller.record if record.caller is not None else None
        with quota_errors():
            reservation = Reservation(services.limits, services.budgets, key, order.work.jobs)
        if key is not None:
            record.headers.update(standing_headers(services.limits, key))
        try:
            yield reservation
        finally:
            if not reservation.owned:
                reservation.end(None)

    async def _run(
        self,
        order: Order,
        record: Record,
        send: Send,
        scope: Scope,
        place: QueuePlace,
        attempt: str | None,
        reservation: Reservation,
        deadline: float | None,
    ) -> Response | None:
        """Generate. Return the response that the caller must send; None after a stream, which is already sent."""
        services, jobs = self._services, order.work.jobs
        meter = services.metrics.generation(jobs, record.started)
        complete = False
        record.generation = GenerationRecord(services.config.model_name, tuple(jobs), order.stream)
        account = Account(
            services.books,
            request_id=record.request_id,
            endpoint=str(scope["path"]),
            key=caller_of(scope).name,
            jobs=jobs,
            attempt=attempt,
            verified=caller_of(scope).record is not None,
            closed=reservation.end,
        )
        reservation.owned = True
        ended = "failed"
        try:
            async with Generation(services.engine, services.text, jobs, account.settle) as generation:
                run = _Run(generation, meter, order, record, account, place, deadline)
                response = await (run.stream(send) if order.stream else run.whole())
                complete = run.complete
                ended = run.ended
        except asyncio.CancelledError:
            ended = "cancelled"
            raise
        except ApiError as error:
            ended = "deadline" if error.detail.code == DEADLINE else ended
            raise
        finally:
            meter.close(complete=complete)
            account.abandon(ended)
        return response


class _Run:
    """One order that runs: reads its deltas and sends its answer."""

    def __init__(
        self,
        generation: Generation,
        meter: GenerationMeter,
        order: Order,
        record: Record,
        account: Account,
        place: QueuePlace,
        deadline: float | None,
    ) -> None:
        self._place = place
        self._deadline = deadline
        self.ended = "failed"  # how the account ends if it is not finished
        self._account = account
        self._generation = generation
        self._meter = meter
        self._order = order
        self._record = record
        self._usages: dict[int, ChoiceUsage] = {}
        self._length = False
        self.complete = False

    async def whole(self) -> Response:
        choices: list[list[TextDelta]] = [[] for _ in self._order.work.jobs]

        def take(delta: TextDelta) -> None:
            self._note(delta)
            choices[delta.index].append(delta)

        try:
            self._generation.listen(take)
            await self._over(None)
            self._place.leave()
            usage = await self._finish()
        except Exception as error:
            raise self._explain(error) from error
        model = self._order.renderer.whole(choices, usage)
        return Response(model.model_dump_json(exclude_unset=True), media_type="application/json")

    async def stream(self, send: Send) -> None:
        try:
            await self._generation.settle(min(ACCEPT_SECONDS, self._left() or ACCEPT_SECONDS))
        except Exception as error:
            raise self._explain(error) from error
        start = Response(headers=sse.HEADERS, media_type=sse.MEDIA_TYPE)
        del start.headers["content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": start.raw_headers})
        renderer = self._order.renderer
        outlet = Outlet(self._record.send or send, renderer.events)
        try:
            if opening := renderer.opening():
                outlet.write(opening)
            last = await self._body(outlet)
        except Exception as error:
            explained = self._explain(error)
            self._record.outcome = outcome_of(explained.status)
            if isinstance(error, DeadlineError):
                self.ended = "deadline"
            last = renderer.failure(explained)
        finally:
            await outlet.close()
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _body(self, outlet: Outlet) -> bytes:
        """Write all events but the last ones, and return those."""

        def take(delta: TextDelta) -> None:
            self._note(delta)
            outlet.put(delta)

        try:
            self._generation.listen(take)
            await self._end(outlet)
        except Exception:
            self._generation.stop()
            self._place.leave()
            await outlet.drain()
            raise
        self._place.leave()
        await outlet.drain()
        return self._order.renderer.ending(await self._finish())

    async def _end(self, outlet: Outlet) -> None:
        """Return when the generation is over. Meanwhile write a comment whenever nothing was written for long."""
        seconds = KEEP_ALIVE_SECONDS
        while True:
            try:
                return await self._over(seconds)
            except QuietError:
                if not outlet.slow and time.monotonic() - outlet.last >= KEEP_ALIVE_SECONDS:
                    outlet.write(sse.KEEP_ALIVE)
                quiet = 0.0 if outlet.slow else time.monotonic() - outlet.last
                seconds = max(KEEP_ALIVE_SECONDS - quiet, 0.001)

    def _left(self) -> float | None:
        """Seconds until the deadline; None: there is none."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    async def _over(self, seconds: float | None) -> None:
        """Return when the generation is over.

        Raises:
            QuietError: it is not, after so many seconds.
            DeadlineError: it is not, and its time is.
            Exception: any other error that ends it.
        """
        left = self._left()
        if left is None or (seconds is not None and seconds < left):
            return await self._generation.over(seconds)
        try:
            await self._generation.over(left)
        except QuietError:
            self._generation.stop()
            raise DeadlineError from None

    def _note(self, delta: TextDelta) -> None:
        if delta.token_ids or delta.finish_reason is not None:
            self._place.begun()
        now = time.monotonic()
        self._meter.delta(delta, now)
        if self._record.generation is not None:
            self._record.generation.take(delta, now)
        if delta.usage is not None:
            self._usages[delta.index] = delta.usage
            self._length |= delta.finish_reason == "length"

    async def _finish(self) -> Usage:
        """Close the account and return the usage with its cost.

        This comes before the last event is sent: if a client saw the end of a request, its ledger row is durable.
        """
        outcome = "length" if self._length else "stop"
        jobs = self._order.work.jobs
        usages = [
            replace(usage, prompt_tokens=0, cached_tokens=0) if jobs[index].shares_prompt else usage
            for index, usage in sorted(self._usages.items())
        ]
        bill = await self._account.finish(usages, outcome)
        self.complete = True
        self._record.outcome = outcome
        usage = total_usage(usages, self._order.work.sparsity.requested)
        details = CostUsage(
            amount=bill.amount,
            currency="USD",
            unit="nano",
            price_version=bill.price_version,
            metered_amount=bill.metered,
            dense_equivalent_amount=bill.dense_equivalent,
            effective_top_k=usage.dsa.top_k,
        )
        return usage.model_copy(update={"cost": bill.amount / 1e9, "cost_details": details})

    def _explain(self, error: Exception) -> ApiError:
        match error:
            case ApiError():
                return error
            case DeadlineError():
                return too_late((self._deadline or 0) - self._record.started)
            case EngineUnavailableError():
                return unavailable(str(error), code="engine_unavailable", kind=ENGINE)
            case EngineDiedError():
                explained = unavailable(str(error), code="engine_died", kind=ENGINE)
            case LedgerUnavailableError():
                explained = unavailable(str(error), code="ledger_unavailable")
            case GenerationAbortedError():
                explained = unavailable(str(error), code="aborted", kind=ENGINE)
            case GrammarFailedError():
                explained = bad_request(str(error), code="grammar_failed")
            case GenerationFailedError():
                explained = ApiError(500, str(error), kind=ENGINE, code="generation_failed")
            case _:
                logger.error("request %s failed", self._record.request_id, exc_info=error)
                return internal_error()
        logger.warning("request %s: %s", self._record.request_id, error)
        return explained
