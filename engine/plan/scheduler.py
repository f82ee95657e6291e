"""Decides what runs in each step: admission, token and page budgets, preemption, and the end of requests.

There are no phases: each request has `num_computed` and `num_tokens`, and every step closes some of the gap. Which
pages hold what is `engine.plan.holdings`'s. A request's place in the order is its priority (lower is earlier), then its
arrival. The file has more than 400 lines because the rules belong together:

1. A running request that misses one token (a decode) gets it in every step. The rest of the token budget goes to
   chunks of the other running requests, in order of place. If there are decodes, chunks of running and waiting
   requests together get no more than the pace allows (`engine.plan.pace`).
2. Requests take pages in order of place, only for this step's tokens. If pages run out, the running request with the
   last place gives up its pages and waits again, to be recomputed. So the first request never waits for a later one,
   and finishes under any load.
3. If no request was preempted, waiting requests start strictly in order of place, each from its longest cached
   prefix, while the budget lasts and the remaining pages can hold all known tokens of the request. (A start with
   fewer pages would only lead to a preemption. The running requests have what they need by then, because a chunk
   that was cut short has spent the budget.) Where the budget is spent, requests of a lower class give theirs back for
   the first of them. Where there is no room, they are preempted, the last first.
4. The rest of budget and pages goes to drafts, in order of place. So a draft never delays a known token and never
   preempts a request. `apply` gives back the pages of rejected drafts.

As a consequence every running request is before every waiting one of the same priority. Integers only: no tensors here.

Up to `MAX_IN_FLIGHT` plans may be in flight, for a runner that computes plans one after another while the next is made
(so do NanoFlow, arXiv 2408.12757, and others). Then a plan is made before the tokens of the one before it are known.
Their ids are `PENDING` in it, and three rules keep it right:

- A plan made ahead never preempts: if pages run out, there is no such plan, and the next one is made after `apply`.
- The number of tokens that are allowed is known ahead, stop tokens are not. A request that turns out to have ended has
  rows in the next plan. Nobody reads their results.
- The pages of a request that has ended are free at once. Who gets them writes in a later plan, and plans are computed
  in order.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from itertools import islice

from engine.config import PAGE_SIZE
from engine.plan.holdings import Holdings
from engine.plan.pace import Pace, Place
from engine.plan.pages import pages_for
from engine.plan.prefix import HashFunction, sha256
from engine.plan.request import Request
from engine.plan.types import ScheduledRequest, StepPlan, StepResult
from engine.protocol import Delta, EngineStats, Submit

MAX_IN_FLIGHT = 2
"""With two plans the device never waits for the host, if the host needs less time for a plan than the device."""


class Scheduler:
    """Owns every request and every page. Use: `plan = schedule(now)`, run it, `apply(plan, result, now)`.

    A plan is in flight between `schedule` and `apply`. Plans are computed and applied in the order in which they were
    made. All other methods may be used at any time. All times are seconds on one clock.

    Args:
        num_pages: pages that the cache holds.
        token_budget: tokens computed in one step, over all requests.
        max_running: requests in one step; at most `token_budget`.
        max_model_len: positions that one request may use, prompt and output together.
        prefix_caching: whether full pages are kept, so that later requests find them by their content.
        draft_tokens: the most drafts that one request gets in one step; 0: no speculation.
        lookup: take drafts from each request's own text; otherwise the runner's results propose them.
        pace: how many prompt tokens may join decodes; None: as many as the budget allows.
        hash_function: finds candidates in the prefix cache; a collision only costs a miss.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        num_pages: int,
        *,
        token_budget: int,
        max_running: int,
        max_model_len: int,
        prefix_caching: bool,
        draft_tokens: int = 0,
        lookup: bool = False,
        pace: Pace | None = None,
        hash_function: HashFunction = sha256,
    ) -> None:
        if not 1 <= max_running <= token_budget:
            raise ValueError(
                f"max_running ({max_running}) must be between 1 and token_budget ({token_budget}), "
                "so that every running request can decode one token a step"
            )
        self._token_budget = token_budget
        self._max_running = max_running
        self._max_model_len = max_model_len
        self._draft_tokens = draft_tokens
        self._lookup = lookup
        self._pace = pace
        self._hash_function = hash_function
        self._holdings = Holdings(num_pages, prefix_caching=prefix_caching)
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []  # both in order of place
        self._waiting: list[Request] = []
        self._arrivals = 0
        self._in_flight: deque[tuple[StepPlan, list[Request]]] = deque()
        self._steps = 0
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._preemptions = 0
        self._drafted = 0
        self._draft_lengths = [0] * (draft_tokens + 1)

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended. If so, and no plan is in flight, `schedule` returns a plan."""
        return bool(self._requests)

    def add(self, submit: Submit, now: float) -> None:
        """Queue a request.

        Raises:
            ValueError: its id is in use, or it could never run; the message says why.
        """
        if submit.request_id in self._requests:
            raise ValueError(f"request id {submit.request_id!r} is in use by a request that has not ended")
        self._refuse_unfit(submit)
        request = Request(
            submit,
            arrival=self._arrivals,
            now=now,
            hash_function=self._hash_function,
            lookup=self._lookup and self._draft_tokens > 0,
        )
        self._arrivals += 1
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=_order)

    def abort(self, request_id: str, now: float) -> Delta | None:
        """End a request now and free its pages. Return its terminal delta, or None if the id is unknown."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._remove(request)
        return request.end("abort", now)

    def abort_all(self, now: float) -> tuple[Delta, ...]:
        """End every request now, in order of arrival, and return their terminal deltas."""
        deltas = (self.abort(request_id, now) for request_id in tuple(self._requests))
        return tuple(delta for delta in deltas if delta is not None)

    def schedule(self, now: float) -> StepPlan | None:
        """Decide the next step and take its pages.

        Return None if there is no work. While a plan is in flight, also return None if the next step depends on its
        result: it needs a preemption, or drafts, or every request is about to end.

        Raises:
            RuntimeError: `MAX_IN_FLIGHT` plans are in flight.
        """
        if len(self._in_flight) == MAX_IN_FLIGHT:
            raise RuntimeError(f"{MAX_IN_FLIGHT} plans are in flight; apply the result of the first one")
        if self._in_flight and self._draft_tokens:
            return None
        wanted, chunks = self._grant_tokens()
        preemptions = self._preemptions
        granted = self._take_pages(wanted)
        if granted is None:
            return None
        if self._preemptions == preemptions and not self._admit(granted, chunks, now):
            self._give_back(granted)
            return None
        if not granted:
            return None
        drafts = self._draft(granted)
        plan = StepPlan(
            requests=tuple(
                request.plan(count, guess) for (request, count), guess in zip(granted, drafts, strict=True)
            ),
            wiped_pages=self._holdings.take_tainted(),
        )
        self._in_flight.append((plan, [request for request, _ in granted]))
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> tuple[Delta, ...]:
        """Apply the result of the first plan in flight, and return the deltas for the clients, in the plan's order.

        Raises:
            RuntimeError: `plan` is not the first plan in flight.
            ValueError: the result does not answer the plan.
        """
        if not self._in_flight or plan is not self._in_flight[0][0]:
            raise RuntimeError("only the first plan in flight can be applied, and only once")
        if len(result.sampled) != len(plan.requests):
            raise ValueError(
                f"the result has {len(result.sampled)} entries for {len(plan.requests)} requests"
            )
        _, requests = self._in_flight.popleft()
        self._steps += 1
        deltas = []
        for request, scheduled, sampled in zip(requests, plan.requests, result.sampled, strict=True):
            if request.ended:  # after this plan was made
                if sampled.error is not None:
                    self._holdings.taint(request)
                continue
            first_new = max(scheduled.start, request.num_prompt, request.peak_computed)
            delta = request.accept(scheduled, sampled, now)
            held = max(0, len(delta.token_ids) - 1) if delta is not None else 0
            self._count(scheduled, first_new, held)
            if sampled.error is None:
                if request.num_computed // PAGE_SIZE > request.num_registered:
                    self._holdings.register(request)
                if scheduled.num_drafts:
                    self._holdings.trim(request)
            else:
                self._holdings.distrust(request)
            if delta is not None:
                deltas.append(delta)
                if delta.finish_reason is not None:
                    self._remove(request)
                    if sampled.error is not None:
                        self._holdings.taint(request)
        return tuple(deltas)

    def stats(self) -> EngineStats:
        """The gauges of this moment, and counters since construction.

        A computed row counts once: as decode if it holds an output token that is computed for the first time, else as
        prefill. The row of a rejected draft counts as neither, only as drafted. Prefix queries and hits are counted
        at each admission.
        """
        pages = self._holdings.pages
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=pages.num_used,
            pages_cached=pages.num_cached,
            pages_free=pages.num_free,
            steps_total=self._steps,
            prefill_tokens_total=self._prefill_tokens,
            decode_tokens_total=self._decode_tokens,
            preemptions_total=self._preemptions,
            prefix_queries_total=self._holdings.prefix_queries,
            prefix_hits_total=self._holdings.prefix_hits,
            draft_tokens_total=self._drafted,
            draft_lengths_total=tuple(self._draft_lengths),
        )

    def check(self) -> None:
        """Verify the scheduler's invariants; for tests.

        Raises:
            RuntimeError: one is violated.
        """
        self._holdings.check(self._running)
        queued = [*self._running, *self._waiting]
        if sorted(map(_order, queued)) != sorted(map(_order, self._requests.values())):
            raise RuntimeError("each request must be queued once")
        for queue in (self._running, self._waiting):
            if queue != sorted(queue, key=_order):
                raise RuntimeError("requests must be queued in order of place")
        for priority in {request.priority for request in queued}:
            arrivals = [request.arrival for request in queued if request.priority == priority]
            if arrivals != sorted(arrivals):
                raise RuntimeError("of one priority, the running requests must be before the waiting ones")
        if len(self._running) > self._max_running:
            raise RuntimeError(f"{len(self._running)} requests run, but max_running is {self._max_running}")
        for request in self._running:
            held, needed = len(request.page_ids), pages_for(request.num_planned)
            if held < needed or (held > needed and not self._in_flight):
                raise RuntimeError(f"request {request.request_id!r} holds {held} pages and needs {needed}")
            if request.num_missing < 1 and not self._in_flight:
                raise RuntimeError(f"request {request.request_id!r} runs, and misses nothing")
        if any(request.page_ids or request.num_planned for request in self._waiting):
            raise RuntimeError("a waiting request must hold no page")

    def _grant_tokens(self) -> tuple[list[tuple[Request, int]], int]:
        """Return the running requests with the tokens that each may compute, and how many more may go to waiting ones."""
        wanted = [(request, request.num_missing) for request in self._running]
        decodes = sum(count == 1 for _, count in wanted)
        chunks = self._chunk_budget(wanted, decodes)
        if decodes < len(wanted):
            for place, (request, count) in enumerate(wanted):
                if count > 1:
                    wanted[place] = (request, min(count, chunks))
                    chunks -= wanted[place][1]
            wanted = [one for one in wanted if one[1]]  # who has 0 waits, or ends with the step in flight
        return wanted, chunks

    def _chunk_budget(self, missing: list[tuple[Request, int]], decodes: int) -> int:
        """How many tokens of this step may go to requests that miss more than one, running or waiting."""
        left = self._token_budget - decodes
        if self._pace is None or not decodes or not left:
            return left
        others = [request for request, count in missing if count > 1]
        places = self._max_running - len(self._running)
        if not places and self._waiting and self._waiting[0].priority < self._running[-1].priority:
            places = 1  # a request of a lower class gives up its own
        others += islice(self._waiting, places)
        if not others:
            return left
        first = others[0]
        return self._pace(
            [_place(request) for request, count in missing if count == 1],
            [Place(request.num_tokens, request.index_top_k) for request in others],
            _place(first),
            left,
        )

    def _take_pages(self, wanted: list[tuple[Request, int]]) -> list[tuple[Request, int]] | None:
        """Take pages for the requests in order of place. Return those that got pages and were not preempted.

        While a plan is in flight, take none and return None if there are too few: its rows may not be preempted.
        """
        granted: list[tuple[Request, int]] = []
        for request, count in wanted:
            # A preempted request has the last place, so nothing was granted to it yet. Its share of the token budget is
            # not used: to give it to others would need more pages, and this step has none.
            while self._is_running(request):
                if self._holdings.extend(request, count):
                    granted.append((request, count))
                    break
                if self._in_flight:
                    self._give_back(granted)
                    return None
                self._preempt(self._running[-1])
        return granted

    def _admit(self, granted: list[tuple[Request, int]], chunks: int, now: float) -> bool:
        """Start waiting requests in order of place, and grant them the rest of the budget for chunks.

        Return False, and start none, if the first of them needs a preemption while a plan is in flight.
        """
        started = False
        while self._waiting:
            request = self._waiting[0]
            while not chunks and granted and granted[-1][0].priority > request.priority:
                later, chunks = granted.pop()  # it goes on in a later step
                self._holdings.trim(later)
            if not chunks:
                break
            if len(self._running) == self._max_running or not self._holdings.admit(request, now):
                last = self._running[-1] if self._running else None
                if last is None or last.priority <= request.priority:
                    break
                if self._in_flight:
                    return started
                chunks += sum(count for one, count in granted if one is last)
                granted[:] = [one for one in granted if one[0] is not last]
                self._preempt(last)
                continue
            started = True
            self._waiting.pop(0)
            insort(self._running, request, key=_order)
            count = min(request.num_missing, chunks)
            if not self._holdings.extend(request, count):
                raise RuntimeError(
                    f"request {request.request_id!r} was admitted without pages for {count} tokens"
                )
            insort(granted, (request, count), key=lambda grant: _order(grant[0]))
            chunks -= count
        return True

    def _give_back(self, granted: list[tuple[Request, int]]) -> None:
        """Release the pages that requests took for a step that is not planned."""
        for request, _ in granted:
            self._holdings.trim(request)

    def _draft(self, granted: list[tuple[Request, int]]) -> list[tuple[int, ...]]:
        """Return each granted request's drafts, as far as budget and pages are left."""
        if not self._draft_tokens:
            return [()] * len(granted)
        budget = self._token_budget - sum(count for _, count in granted)
        drafts: list[tuple[int, ...]] = []
        for request, count in granted:
            guess: tuple[int, ...] = ()
            if count == request.num_missing:
                guess = request.draft(min(self._draft_tokens, budget))
                if not self._holdings.extend(request, count + len(guess)):
                    guess = guess[: len(request.page_ids) * PAGE_SIZE - request.num_planned - count]
            drafts.append(guess)
            budget -= len(guess)
        return drafts

    def _count(self, scheduled: ScheduledRequest, first_new: int, held: int) -> None:
        """Count the rows of one result. Rows from position `first_new` on are new; `held` drafts were accepted."""
        known = len(scheduled.token_ids) - scheduled.num_drafts
        decoded = max(0, scheduled.start + known + held - first_new)
        self._decode_tokens += decoded
        self._prefill_tokens += known + held - decoded
        if scheduled.num_drafts:
            self._drafted += scheduled.num_drafts
            self._draft_lengths[held] += 1

    def _preempt(self, request: Request) -> None:
        """Take the pages of the running request with the last place, and put it into the queue."""
        self._running.remove(request)
        self._holdings.pages.release(request.preempt())
        insort(self._waiting, request, key=_order)
        self._preemptions += 1

    def _remove(self, request: Request) -> None:
        """Take a request off its queue and release its pages. Every request ends here."""
        request.ended = True
        del self._requests[request.request_id]
        if request.page_ids:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        self._holdings.pages.release(request.page_ids)

    def _is_running(self, request: Request) -> bool:
        # While pages are taken, only the last of the running requests leaves.
        return bool(self._running) and _order(self._running[-1]) >= _order(request)

    def _refuse_unfit(self, submit: Submit) -> None:
        prompt, output = len(submit.prompt_token_ids), submit.sampling.max_tokens
        if prompt < 1 or output < 1:
            raise ValueError(
                f"a request needs at least 1 prompt token and 1 output token, not {prompt} and {output}"
            )
        if submit.index_top_k is not None and submit.index_top_k < 1:
            raise ValueError(f"index_top_k must be at least 1, not {submit.index_top_k}")
        if prompt + output > self._max_model_len:
            raise ValueError(
                f"prompt ({prompt}) and max_tokens ({output}) are {prompt + output} tokens together, "
                f"but max_model_len is {self._max_model_len}"
            )
        needed = pages_for(prompt + output - 1)  # the last token is sampled but never computed
        if needed > self._holdings.pages.num_pages:
            raise ValueError(
                f"prompt ({prompt}) and max_tokens ({output}) may need {needed} pages, "
                f"but the cache has {self._holdings.pages.num_pages}"
            )


def _place(request: Request) -> Place:
    return Place(request.num_planned, request.index_top_k)


def _order(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival
