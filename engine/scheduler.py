"""What runs in each step: admission, token and page budgets, preemption, and the end of requests.

There are no phases: each request has `num_computed` and `num_tokens`, and every step closes some of the
gap. The rules, in order:

1. A running request that misses one token (a decode) gets it in every step; what is left of the token
   budget goes to chunks of the other running requests, in order of arrival.
2. Pages are taken in order of arrival, just for this step's tokens. Where they run out, the running
   request that arrived last gives up its pages and waits again, to be recomputed. So the oldest request
   never waits for a younger one, and finishes whatever the load.
3. If nobody was preempted, waiting requests start strictly in order of arrival, each from the longest
   prefix that is cached, while the budget lasts and the pages left can hold all its known tokens.
   (Starting with less would only buy a preemption. The running requests have what they need by then: a
   chunk that was cut short has spent the budget.)
4. What is left of budget and pages goes to drafts, in order of arrival. So a guess never delays a token that
   is known, and preempts nobody. Pages taken for drafts that did not hold are given back in `apply`.

As a consequence every running request arrived before every waiting one. Integers only: no tensors here.
"""

from __future__ import annotations

from collections import Counter, deque

from engine.config import PAGE_SIZE
from engine.kv.pages import PageAllocator, pages_for
from engine.kv.prefix import HashFunction, PrefixCache, sha256
from engine.plan import ScheduledRequest, StepPlan, StepResult
from engine.protocol import Delta, EngineStats, Submit
from engine.request import Request


class Scheduler:
    """Owns every request and every page. Use: `plan = schedule(now)`, run it, `apply(plan, result, now)`.

    `add`, `has_work` and `stats` may be used at any time. While a plan is in flight (between `schedule`
    and `apply`) its step may still write to its pages, so nothing may end then: `abort` and `abort_all`
    raise. All times are seconds on one clock.

    Args:
        num_pages: pages that the cache holds.
        token_budget: tokens computed in one step, over all requests.
        max_running: requests in one step; at most `token_budget`.
        max_model_len: positions that one request may use, prompt and output together.
        prefix_caching: whether full pages are kept and found again by their content.
        draft_tokens: the most drafts that one request gets in one step; 0 is no speculation.
        lookup: draft from each request's own text; otherwise drafts are what the runner's results propose.
        hash_function: finds candidates in the prefix cache; a collision costs a miss only.

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
        self._prefix_caching = prefix_caching
        self._draft_tokens = draft_tokens
        self._lookup = lookup
        self._hash_function = hash_function
        self._prefix = PrefixCache()
        self._pages = PageAllocator(num_pages, on_evict=self._prefix.forget)
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []  # both in order of arrival
        self._waiting: deque[Request] = deque()
        self._arrivals = 0
        self._in_flight: StepPlan | None = None
        self._tainted: list[int] = []  # pages that the next step zeroes before it writes
        self._steps = 0
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0
        self._drafted = 0
        self._draft_lengths = [0] * (draft_tokens + 1)

    @property
    def has_work(self) -> bool:
        """Whether any request is alive; if so, and none is in flight, `schedule` returns a plan."""
        return bool(self._requests)

    def add(self, submit: Submit, now: float) -> None:
        """Queue a request.

        Raises:
            ValueError: its id is in use, or it could never run; the sentence says why.
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
        self._waiting.append(request)

    def abort(self, request_id: str, now: float) -> Delta | None:
        """End a request now and free its pages; returns its terminal delta, or None if the id is unknown.

        Raises:
            RuntimeError: a plan is in flight, so its pages may still be written.
        """
        self._refuse_in_flight("abort")
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._remove(request)
        return request.end("abort", now)

    def abort_all(self, now: float) -> tuple[Delta, ...]:
        """End every request now, in order of arrival; returns their terminal deltas.

        Raises:
            RuntimeError: a plan is in flight.
        """
        deltas = (self.abort(request_id, now) for request_id in tuple(self._requests))
        return tuple(delta for delta in deltas if delta is not None)

    def schedule(self, now: float) -> StepPlan | None:
        """Decide the next step, and take its pages; None exactly when there is no work.

        Raises:
            RuntimeError: the plan before was not applied.
        """
        self._refuse_in_flight("schedule")
        wanted = self._grant_tokens()
        preemptions = self._preemptions
        granted = self._take_pages(wanted)
        if self._preemptions == preemptions:
            self._admit(granted, now)
        if not granted:
            return None
        drafts = self._draft(granted)
        self._in_flight = StepPlan(
            requests=tuple(
                request.plan(count, guess) for (request, count), guess in zip(granted, drafts, strict=True)
            ),
            wiped_pages=tuple(self._tainted),
        )
        self._tainted.clear()
        return self._in_flight

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> tuple[Delta, ...]:
        """Take in the result of the plan in flight; returns what clients must hear, in the plan's order.

        Raises:
            RuntimeError: `plan` is not the plan in flight.
            ValueError: the result does not answer the plan.
        """
        if plan is not self._in_flight:
            raise RuntimeError("only the plan that schedule() returned last can be applied, and only once")
        if len(result.sampled) != len(plan.requests):
            raise ValueError(
                f"the result has {len(result.sampled)} entries for {len(plan.requests)} requests"
            )
        self._in_flight = None
        self._steps += 1
        deltas = []
        for scheduled, sampled in zip(plan.requests, result.sampled, strict=True):
            request = self._requests[scheduled.request_id]
            first_new = max(scheduled.start, request.num_prompt, request.peak_computed)
            delta = request.accept(scheduled, sampled, now)
            held = max(0, len(delta.token_ids) - 1) if delta is not None else 0
            self._count(scheduled, first_new, held)
            if sampled.error is None:
                self._register(request)
                self._trim(request)
            else:
                self._distrust(request)
            if delta is not None:
                deltas.append(delta)
                if delta.finish_reason is not None:
                    self._remove(request)
                    if sampled.error is not None:
                        self._taint(request)
        return tuple(deltas)

    def stats(self) -> EngineStats:
        """Gauges of now and counters since construction.

        Every computed row counts once: as decode if it holds an output token computed for the first time,
        as prefill otherwise. The row of a draft that did not hold is neither: it is drafted, not accepted.
        Prefix queries and hits are counted at each admission.
        """
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=self._pages.num_used,
            pages_cached=self._pages.num_cached,
            pages_free=self._pages.num_free,
            steps_total=self._steps,
            prefill_tokens_total=self._prefill_tokens,
            decode_tokens_total=self._decode_tokens,
            preemptions_total=self._preemptions,
            prefix_queries_total=self._prefix_queries,
            prefix_hits_total=self._prefix_hits,
            draft_tokens_total=self._drafted,
            draft_lengths_total=tuple(self._draft_lengths),
        )

    def check(self) -> None:
        """Verify what must always hold; for tests.

        Raises:
            RuntimeError: it does not.
        """
        holders = Counter(page_id for request in self._running for page_id in request.page_ids)
        self._pages.check(holders, self._prefix.page_ids)
        queued = [*self._running, *self._waiting]
        if [r.arrival for r in queued] != sorted(r.arrival for r in self._requests.values()):
            raise RuntimeError("each request must be queued once, the running before the waiting, by arrival")
        if len(self._running) > self._max_running:
            raise RuntimeError(f"{len(self._running)} requests run, but max_running is {self._max_running}")
        for request in self._running:
            held, computed = len(request.page_ids), pages_for(request.num_computed)
            if held < computed or (held > computed and self._in_flight is None) or request.num_missing < 1:
                raise RuntimeError(f"request {request.request_id!r} holds {held} pages and needs {computed}")
        if any(request.page_ids or request.num_computed for request in self._waiting):
            raise RuntimeError("a waiting request must hold no page")

    def _grant_tokens(self) -> list[tuple[Request, int]]:
        """The running requests and how many tokens each may compute; decodes come first in the budget."""
        budget = self._token_budget - sum(request.num_missing == 1 for request in self._running)
        wanted = []
        for request in self._running:
            count = 1
            if request.num_missing > 1:
                count = min(request.num_missing, budget)
                budget -= count
            if count:
                wanted.append((request, count))
        return wanted

    def _take_pages(self, wanted: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """Give each its pages, in order of arrival; returns those that got them and were not preempted."""
        granted = []
        for request, count in wanted:
            # Who is preempted arrived last, so was granted nothing yet. Its share of the token budget lapses:
            # handing it out again would need more pages, which is what this step is short of.
            while self._is_running(request):
                if self._extend(request, count):
                    granted.append((request, count))
                    break
                self._preempt(self._running[-1])
        return granted

    def _admit(self, granted: list[tuple[Request, int]], now: float) -> None:
        """Start waiting requests in order of arrival, and grant them what is left of the budget."""
        budget = self._token_budget - sum(count for _, count in granted)
        while self._waiting and budget and len(self._running) < self._max_running:
            request = self._waiting[0]
            hits: tuple[int, ...] = ()
            reads_cache = self._prefix_caching and request.reads_cache
            if reads_cache:
                # One token stays to be computed: its row gives the logits of the next.
                hits = self._prefix.lookup(request.keys, (request.num_tokens - 1) // PAGE_SIZE)
            unheld = sum(self._pages.references(page_id) == 0 for page_id in hits)
            needed = pages_for(request.num_tokens) - len(hits)
            if self._pages.num_available - unheld < needed:
                break
            self._waiting.popleft()
            self._running.append(request)
            self._pages.retain(hits)
            request.admit(hits, len(hits) * PAGE_SIZE, now)
            if reads_cache:
                self._prefix_queries += request.num_tokens
                self._prefix_hits += request.num_computed
            count = min(request.num_missing, budget)
            if not self._extend(request, count):
                raise RuntimeError(
                    f"request {request.request_id!r} was admitted without pages for {count} tokens"
                )
            granted.append((request, count))
            budget -= count

    def _draft(self, granted: list[tuple[Request, int]]) -> list[tuple[int, ...]]:
        """What each granted request guesses of its next tokens, as far as budget and pages are left."""
        budget = self._token_budget - sum(count for _, count in granted)
        drafts: list[tuple[int, ...]] = []
        for request, count in granted:
            guess: tuple[int, ...] = ()
            if count == request.num_missing:
                guess = request.draft(min(self._draft_tokens, budget))
                if not self._extend(request, count + len(guess)):
                    guess = guess[: len(request.page_ids) * PAGE_SIZE - request.num_computed - count]
            drafts.append(guess)
            budget -= len(guess)
        return drafts

    def _count(self, scheduled: ScheduledRequest, first_new: int, held: int) -> None:
        """Count the rows of one result: new from position `first_new` on, `held` drafts among them."""
        known = len(scheduled.token_ids) - scheduled.num_drafts
        decoded = max(0, scheduled.start + known + held - first_new)
        self._decode_tokens += decoded
        self._prefill_tokens += known + held - decoded
        if scheduled.num_drafts:
            self._drafted += scheduled.num_drafts
            self._draft_lengths[held] += 1

    def _trim(self, request: Request) -> None:
        """Give back the pages that only drafts were computed in."""
        kept = pages_for(request.num_computed)
        self._pages.release(request.page_ids[kept:])
        del request.page_ids[kept:]

    def _extend(self, request: Request, count: int) -> bool:
        """Let the request hold pages for `count` more tokens; False, and no change, if they are not there."""
        pages = self._pages.allocate(pages_for(request.num_computed + count) - len(request.page_ids))
        if pages is None:
            return False
        request.page_ids.extend(pages)
        return True

    def _preempt(self, request: Request) -> None:
        """Take the pages of the request that arrived last, and put it at the front of the queue."""
        self._running.remove(request)
        self._pages.release(request.preempt())
        self._waiting.appendleft(request)
        self._preemptions += 1

    def _register(self, request: Request) -> None:
        """Tell the prefix cache of the pages that became full."""
        if not self._prefix_caching:
            return
        for index in range(request.num_registered, request.num_computed // PAGE_SIZE):
            page_id = request.page_ids[index]
            if self._prefix.register(request.keys, index, page_id):
                self._pages.keep(page_id)
            request.num_registered = index + 1

    def _distrust(self, request: Request) -> None:
        """Drop what a faulty request computed or read from the prefix cache.

        If a page holds what made it fail (not-a-number, say), every later hit would fail the same way.
        """
        for page_id in request.page_ids:
            self._prefix.forget(page_id)
            self._pages.unkeep(page_id)

    def _taint(self, request: Request) -> None:
        """Have the pages wiped that a faulty request leaves to nobody; what others still hold is theirs."""
        free = (page_id for page_id in request.page_ids if not self._pages.references(page_id))
        self._tainted.extend(page_id for page_id in free if page_id not in self._tainted)

    def _remove(self, request: Request) -> None:
        """The one way out: off its queue, its pages released."""
        del self._requests[request.request_id]
        if request.page_ids:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        self._pages.release(request.page_ids)

    def _is_running(self, request: Request) -> bool:
        # Only the last of the running ever leaves while pages are taken.
        return bool(self._running) and self._running[-1].arrival >= request.arrival

    def _refuse_unfit(self, submit: Submit) -> None:
        prompt, output = len(submit.prompt_token_ids), submit.sampling.max_tokens
        if prompt < 1 or output < 1:
            raise ValueError(
                f"a request needs at least 1 prompt token and 1 output token, not {prompt} and {output}"
            )
        if submit.top_k is not None and submit.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {submit.top_k}")
        if prompt + output > self._max_model_len:
            raise ValueError(
                f"prompt ({prompt}) and max_tokens ({output}) are {prompt + output} tokens together, "
                f"but max_model_len is {self._max_model_len}"
            )
        needed = pages_for(prompt + output - 1)  # the last token is sampled but never computed
        if needed > self._pages.num_pages:
            raise ValueError(
                f"prompt ({prompt}) and max_tokens ({output}) may need {needed} pages, "
                f"but the cache has {self._pages.num_pages}"
            )

    def _refuse_in_flight(self, action: str) -> None:
        if self._in_flight is not None:
            raise RuntimeError(f"cannot {action} while a plan is in flight; apply its result first")
