"""A fake model over a fake paged cache, and a driver that checks every step of a scheduler with them.

What the fake model stores for a position depends on every token and the sparsity of all
positions before it, and its next token depends on what it reads back, so a page that is reused, evicted or
shared wrongly is seen at once, and so is a text that a preemption changed.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

from engine.config import PAGE_SIZE
from engine.plan.pages import pages_for
from engine.plan.scheduler import MAX_IN_FLIGHT, Scheduler
from engine.plan.types import PENDING, Drawn, Sampled, ScheduledRequest, StepPlan, StepResult
from engine.protocol import Delta, SamplingParams, Submit, TokenLogprob
from engine.step.speculation import row_specs, verify

VOCABULARY = 40
FAULTY_SEED = 9  # a request with this seed fails when its third token is due


def make(name: str, prompt: int | tuple[int, ...], max_tokens: int = 4, **fields: Any) -> Submit:
    """A request; its prompt is spelled out, or a length of tokens that only this name has."""
    tokens = prompt if isinstance(prompt, tuple) else tuple(1000 + ord(name[0]) for _ in range(prompt))
    index_top_k: int | None = fields.pop("index_top_k", None)
    priority: int = fields.pop("priority", 0)
    params = SamplingParams(max_tokens=max_tokens, **{"seed": 0, **fields})
    return Submit(
        request_id=name,
        prompt_token_ids=tokens,
        sampling=params,
        index_top_k=index_top_k,
        priority=priority,
    )


def content(before: int, token_id: int, position: int, submit: Submit) -> int:
    """What a position's cache entry holds, given the entry before it."""
    sparse = (
        submit.index_top_k if submit.index_top_k is not None and position + 1 > submit.index_top_k else -1
    )
    return hash((before, token_id, sparse)) & 0xFFFFFFFF


def next_token(last: int, submit: Submit, output_index: int) -> int:
    return hash((last, submit.sampling.seed, output_index)) % VOCABULARY


def reference(submit: Submit) -> tuple[tuple[int, ...], str]:
    """The text and finish reason of a request that has the model for itself."""
    output: list[int] = []
    last = 0
    for position in range(len(submit.prompt_token_ids) + submit.sampling.max_tokens):
        if position >= len(submit.prompt_token_ids):
            if submit.sampling.seed == FAULTY_SEED and len(output) == 2:
                return tuple(output), "error"
            output.append(next_token(last, submit, len(output)))
            if output[-1] in submit.sampling.stop_token_ids:
                return tuple(output), "stop"
        last = content(last, (*submit.prompt_token_ids, *output)[position], position, submit)
    return tuple(output), "length"


class FakeModel:
    """Runs plans over a fake cache: per page, what each of its positions holds."""

    def __init__(self) -> None:
        self.submits: dict[str, Submit] = {}
        self.pages: dict[int, list[int]] = {}
        self.wiped: list[int] = []
        self.known: dict[str, list[int]] = {}  # all tokens of each request
        self.truth: dict[str, list[int]] = {}  # what their positions must hold
        self.drafting = random.Random(0)
        self.draft_tokens = 0  # proposed with each result: right ones, with wrong ones among them

    def add(self, submit: Submit) -> None:
        self.submits[submit.request_id] = submit
        self.known[submit.request_id] = list(submit.prompt_token_ids)
        self.truth[submit.request_id] = []

    def run(self, plan: StepPlan) -> StepResult:
        for page_id in plan.wiped_pages:
            self.pages[page_id] = [0] * PAGE_SIZE  # who still needs it would notice
        self.wiped.extend(plan.wiped_pages)
        for scheduled in plan.requests:  # as on a device, all rows write before any row is sampled from
            self._write(scheduled)
        return StepResult(sampled=tuple(self._sample(scheduled) for scheduled in plan.requests))

    def _write(self, scheduled: ScheduledRequest) -> None:
        submit, known = self.submits[scheduled.request_id], self.known[scheduled.request_id]
        truth = self.truth[scheduled.request_id]
        end = scheduled.start + len(scheduled.token_ids) - scheduled.num_drafts
        if len(known) < end:  # the row of a request that has failed
            assert scheduled.token_ids == (PENDING,)
            known.append(0)
        asked = tuple(known[scheduled.start : end])
        if scheduled.token_ids[-1] == PENDING:
            asked = (*asked[:-1], PENDING)
        assert (*scheduled.token_ids,) == (*asked, *scheduled.drafts)
        assert (
            len(scheduled.page_ids) == len(set(scheduled.page_ids)) == pages_for(end + scheduled.num_drafts)
        )
        for position in range(len(truth), end):
            truth.append(content(truth[-1] if truth else 0, known[position], position, submit))
        rows = truth[:end]
        for position, draft in enumerate(scheduled.drafts, end):
            rows.append(content(rows[-1], draft, position, submit))
        for position in range(scheduled.start, len(rows)):
            page = self.pages.setdefault(scheduled.page_ids[position // PAGE_SIZE], [0] * PAGE_SIZE)
            page[position % PAGE_SIZE] = rows[position]

    def _sample(self, scheduled: ScheduledRequest) -> Sampled:
        name = scheduled.request_id
        end = scheduled.start + len(scheduled.token_ids) - scheduled.num_drafts
        submit, known, truth = self.submits[name], self.known[name], self.truth[name]
        read = [entry for page_id in scheduled.page_ids for entry in self.pages[page_id]]
        assert read[:end] == truth[:end], f"{name} reads what it never wrote"
        for index, target in enumerate(scheduled.prompt_targets):
            assert target == submit.prompt_token_ids[scheduled.start + index + 1]
        prompt = tuple(
            TokenLogprob(token_id=target, logprob=-float(scheduled.start + index), rank=1, top=())
            for index, target in enumerate(scheduled.prompt_targets)
        )
        assert (scheduled.sample is not None) == (end == len(known))
        if scheduled.sample is None:
            return Sampled(prompt_logprobs=prompt)
        drawn: list[Drawn] = []
        for row, spec in enumerate(row_specs(scheduled), end - 1):
            index = row + 1 - len(submit.prompt_token_ids)
            assert spec.output_index == index
            if spec.params.presence_penalty and PENDING not in scheduled.token_ids:
                assert spec.history == (*known, *scheduled.drafts[: row + 1 - end])
            if submit.sampling.seed == FAULTY_SEED and index == 2:
                drawn.append(Drawn(error="faulty on purpose"))
                continue
            token_id = next_token(read[row], submit, index)
            logprob = TokenLogprob(token_id=token_id, logprob=-float(index), rank=1, top=())
            drawn.append(Drawn(token_id=token_id, logprob=logprob))
        result = verify(scheduled, drawn)
        known += result.token_ids
        return msgspec.structs.replace(
            result, prompt_logprobs=prompt, draft_token_ids=self._propose(submit, known)
        )

    def _propose(self, submit: Submit, known: list[int]) -> tuple[int, ...]:
        """What follows `known`, wrong from a random place on."""
        entry = 0
        for position, token_id in enumerate(known):
            entry = content(entry, token_id, position, submit)
        drafts: list[int] = []
        for _ in range(self.draft_tokens):
            position = len(known) + len(drafts)
            token_id = next_token(entry, submit, position - len(submit.prompt_token_ids))
            drafts.append(VOCABULARY if self.drafting.random() < 0.2 else token_id)
            entry = content(entry, drafts[-1], position, submit)
        return tuple(drafts)


class Driver:
    """A scheduler, its model and its clients; checks after each action what must always hold."""

    def __init__(
        self, num_pages: int = 64, *, budget: int = 64, max_running: int = 4, **options: Any
    ) -> None:
        options = {"max_model_len": 4096, "prefix_caching": True, **options}
        self.pace: int | None = options.pop("pace", None)  # prompt tokens beside decodes
        if self.pace is not None:
            options["pace"] = lambda decodes, soon, prompt, at_most: min(at_most, self.pace)
        self.scheduler = Scheduler(num_pages, token_budget=budget, max_running=max_running, **options)
        self.budget = budget
        self.ahead = False  # whether a step is planned before the result of the one before it is applied
        self.model = FakeModel()
        self.model.draft_tokens = 0 if options.get("lookup") else options.get("draft_tokens", 0)
        self.output: dict[str, list[int]] = {}
        self.prompt_logprobs: dict[str, tuple[TokenLogprob | None, ...]] = {}
        self.last: dict[str, Delta] = {}
        self.drafts: dict[str, tuple[int, ...]] = {}  # of the last step
        self.in_flight: list[StepPlan] = []
        self.now = 0.0

    def add(self, *submits: Submit) -> None:
        for submit in submits:
            self.scheduler.add(submit, self.now)
            self.model.add(submit)
            self.output[submit.request_id] = []
        self.scheduler.check()

    def hear(self, delta: Delta) -> None:
        assert delta.request_id not in self.last, "nothing may follow a terminal delta"
        first = bool(delta.token_ids) and not self.output[delta.request_id]
        assert (delta.usage is not None) == (first or delta.finish_reason is not None)
        before = len(self.output[delta.request_id])
        self.output[delta.request_id] += delta.token_ids
        if self.model.submits[delta.request_id].sampling.logprobs is not None and delta.token_ids:
            assert delta.logprobs is not None
            assert [(e.token_id, -e.logprob) for e in delta.logprobs] == [
                (token_id, before + i) for i, token_id in enumerate(delta.token_ids)
            ]
        if delta.prompt_logprobs is not None:
            assert delta.request_id not in self.prompt_logprobs
            assert before == 0
            self.prompt_logprobs[delta.request_id] = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.last[delta.request_id] = delta
            self.scheduler.check()

    def abort(self, name: str) -> None:
        delta = self.scheduler.abort(name, self.now)
        assert delta is not None
        assert delta.finish_reason == "abort"
        self.hear(delta)

    def step(self) -> dict[str, tuple[int, int]]:
        """One step; returns each scheduled request's start and number of tokens, in the plan's order."""
        if self.ahead:
            return self._step_ahead()
        self.now += 1.0
        scheduler = self.scheduler
        places = {r.request_id: (r.priority, r.arrival) for r in scheduler._requests.values()}
        ran = [r.request_id for r in scheduler._running]
        decoding = {r.request_id for r in scheduler._running if r.num_missing == 1}
        waiting, before = [r.request_id for r in scheduler._waiting], scheduler.stats()
        plan = scheduler.schedule(self.now)
        assert (plan is not None) == scheduler.has_work
        if plan is None:
            return {}
        work = {s.request_id: (s.start, len(s.token_ids) - s.num_drafts) for s in plan.requests}
        self.drafts = {s.request_id: s.drafts for s in plan.requests if s.num_drafts}
        after = scheduler.stats()
        scheduler.check()
        assert len(work) == len(plan.requests)
        assert all(count > 0 for _, count in work.values())
        assert plan.num_tokens <= self.budget
        chunks = sum(count for name, (_, count) in work.items() if name not in decoding)
        served = len(
            decoding & work.keys()
        )  # decodes of a lower class may give theirs to a request that starts
        assert chunks <= self._limit(len(decoding)) - served, "decodes were slowed down"
        assert work.keys() & {min(names, key=places.__getitem__) for names in (ran, waiting) if names}, (
            "the first request must make progress"
        )
        running = {r.request_id for r in scheduler._running}
        started = [places[name] for name in running & set(waiting)]
        first = min((place[0] for place in started), default=1 << 31)
        stalled = (decoding & running) - work.keys()
        assert all(places[name][0] > first for name in stalled), "a decode was stalled"
        if after.preemptions_total > before.preemptions_total:
            lost = [places[name] for name in ran if name not in running]
            low = min(lost, default=max(places.values()))[0]
            assert all(place[0] < low for place in started), "admitted in a step that preempted"
        elif (
            running <= work.keys()
            and chunks < self._limit(len(decoding)) - len(decoding)
            and plan.num_tokens < self.budget
        ):
            assert all(sum(work[r.request_id]) == len(r.token_ids) for r in scheduler._running), (
                "budget wasted"
            )
        for scheduled in plan.requests:
            for page_id in scheduled.page_ids[scheduled.start // PAGE_SIZE :]:
                assert scheduler._holdings.pages.references(page_id) == 1, "writes to a shared page"
        for delta in scheduler.apply(plan, self.model.run(plan), self.now):
            self.hear(delta)
        scheduler.check()
        stats = scheduler.stats()
        assert stats.steps_total == before.steps_total + 1
        rows = (stats.prefill_tokens_total + stats.decode_tokens_total) - (
            before.prefill_tokens_total + before.decode_tokens_total
        )
        drafted = stats.draft_tokens_total - before.draft_tokens_total
        held = sum(n * count for n, count in enumerate(stats.draft_lengths_total)) - sum(
            n * count for n, count in enumerate(before.draft_lengths_total)
        )
        assert drafted == sum(s.num_drafts for s in plan.requests)
        assert rows + drafted - held == plan.num_tokens
        return work

    def _step_ahead(self) -> dict[str, tuple[int, int]]:
        """Plan until as many plans are in flight as may be, then apply the first; returns the newest plan's work."""
        self.now += 1.0
        scheduler = self.scheduler
        while len(self.in_flight) < MAX_IN_FLIGHT:
            plan = scheduler.schedule(self.now)
            scheduler.check()
            if plan is None:
                assert self.in_flight or not scheduler.has_work
                break
            assert plan.num_tokens <= self.budget
            for scheduled in plan.requests:
                for page_id in scheduled.page_ids[scheduled.start // PAGE_SIZE :]:
                    assert scheduler._holdings.pages.references(page_id) == 1, "writes to a shared page"
            self.in_flight.append(plan)
        if not self.in_flight:
            return {}
        work = {s.request_id: (s.start, len(s.token_ids)) for s in self.in_flight[-1].requests}
        first = self.in_flight.pop(0)
        for delta in scheduler.apply(first, self.model.run(first), self.now):
            self.hear(delta)
        scheduler.check()
        return work

    def _limit(self, decodes: int) -> int:
        """Tokens of a step that has so many decodes, drafts left out."""
        if self.pace is None or not decodes:
            return self.budget
        return min(self.budget, decodes + self.pace)

    def drain(self) -> None:
        """Run to the end: each step the oldest request computes a token that it keeps, so that is bounded."""
        alive = self.scheduler._requests.values()
        bound = sum(r.num_prompt + r.sampling.max_tokens for r in alive)
        for _ in range(bound):
            self.step()
        while self.in_flight:  # rows of requests that have ended
            self.step()
        assert not self.scheduler.has_work
        assert self.last.keys() == self.output.keys()
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        for name, last in self.last.items():
            submit = self.model.submits[name]
            text, reason = reference(submit)
            output = tuple(self.output[name])
            if last.finish_reason == "abort":
                assert output == text[: len(output)]
            else:
                assert (output, last.finish_reason) == (text, reason)
            assert last.usage is not None
            assert last.usage.completion_tokens == len(output)
            assert last.usage.prompt_tokens == len(submit.prompt_token_ids)
            if submit.sampling.prompt_logprobs is not None and output:
                entries = self.prompt_logprobs[name]
                assert entries[0] is None
                assert [(e.token_id, -e.logprob) for e in entries[1:] if e] == [
                    (token_id, row) for row, token_id in enumerate(submit.prompt_token_ids[1:])
                ]
