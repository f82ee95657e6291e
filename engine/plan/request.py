"""The scheduler's record of one request: its tokens, how many are computed, and where.

There are no phases: `num_computed` tokens have their keys and values in `page_ids`, `num_tokens` are there, and the
scheduler closes the gap. A request applies results to itself. Queues, pages and budgets are the scheduler's.

A step may be planned while the one before it still computes. So `num_planned` runs ahead of `num_computed` by the rows in
flight, and tokens may be pending: steps in flight draw them, and nobody here knows them yet.
"""

from __future__ import annotations

from engine.plan.lookup import PromptLookup
from engine.plan.prefix import HashFunction, PageKeys, sha256
from engine.plan.types import PENDING, Sampled, SampleSpec, ScheduledRequest
from engine.protocol import Delta, FinishReason, RequestUsage, Submit, TokenLogprob, has_penalty


class Request:
    """One live request. Mutable, and owned by the scheduler.

    Args:
        submit: the message that asked for it.
        arrival: its place in the order of arrival; larger is later.
        now: seconds on the engine's clock.
        hash_function: for the keys of its pages.
        lookup: take drafts from its own text; otherwise results propose them.
    """

    def __init__(
        self,
        submit: Submit,
        *,
        arrival: int,
        now: float,
        hash_function: HashFunction = sha256,
        lookup: bool = False,
    ) -> None:
        self.request_id = submit.request_id
        self.sampling = submit.sampling
        self.index_top_k = submit.index_top_k
        self.priority = submit.priority
        self.arrival = arrival
        self.num_prompt = len(submit.prompt_token_ids)
        self.token_ids = list(submit.prompt_token_ids)  # prompt, then output
        self.num_computed = 0  # rows whose results are applied
        self.num_planned = 0  # these and the rows in flight
        self.num_pending = 0  # tokens that steps in flight draw
        self.ended = False  # rows that are still in flight then are of no use
        self.peak_computed = 0  # the largest `num_computed` ever: rows below it are recomputed
        self.page_ids: list[int] = []
        self.num_registered = 0  # leading pages that are registered in the prefix cache
        self.keys = PageKeys(
            self.token_ids,
            index_top_k=submit.index_top_k,
            hash_function=hash_function,
            cache_salt=submit.cache_salt,
        )
        self.cached_tokens: int | None = None  # found at first admission; None before it
        self.preemptions = 0
        self._lookup = PromptLookup(self.token_ids) if lookup else None
        self._proposed: tuple[int, ...] = ()  # drafts of the newest result, to follow the known tokens
        self._stop_token_ids = frozenset(submit.sampling.stop_token_ids)
        self._most_tokens = self.num_prompt + submit.sampling.max_tokens
        self._penalised = has_penalty(submit.sampling)
        self._pages: tuple[int, ...] | None = (
            None  # `page_ids` for plans, which share it while nothing changes
        )
        # No token is before the first one, so it has no logprob.
        self._first_scored = max(submit.sampling.prompt_logprobs_start, 1)
        self._prompt_logprobs: list[TokenLogprob] = []  # of prompt positions from `_first_scored` on
        self._submitted = now
        self._first_scheduled: float | None = None
        self._first_token: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, pending tokens included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_missing(self) -> int:
        """Tokens that no step has computed or computes; 1 when decoding. The last token that is allowed never is."""
        tokens = len(self.token_ids) + self.num_pending
        last = self.num_pending > 0 and tokens >= self._most_tokens
        return tokens - self.num_planned - last

    @property
    def num_generated(self) -> int:
        """Output tokens so far, pending tokens included."""
        return self.num_tokens - self.num_prompt

    @property
    def num_reusable(self) -> int:
        """How many leading tokens may come from cached pages.

        At least the last known token must be computed, because its row gives the logits of the next token. Prompt
        logprobs need all rows from the one before the first scored position.
        """
        if self.sampling.prompt_logprobs is None:
            return self.num_tokens - 1
        return min(self._first_scored, self.num_tokens) - 1

    @property
    def _last_scored(self) -> int:
        """The last prompt position whose logprob, and those before it, are known or not asked for."""
        return self._first_scored - 1 + len(self._prompt_logprobs)

    def admit(self, page_ids: tuple[int, ...], cached_tokens: int, now: float) -> None:
        """Start, or start again, from `page_ids`, which hold the first `cached_tokens` tokens."""
        self.page_ids, self._pages = list(page_ids), None
        self.num_registered = len(page_ids)
        self.num_computed = self.num_planned = cached_tokens
        if self.cached_tokens is None:
            self.cached_tokens = cached_tokens
            self._first_scheduled = now

    def preempt(self) -> tuple[int, ...]:
        """Forget the computed rows, keep all tokens, and return the pages, which the caller must release.

        None of its rows may be in flight.
        """
        page_ids = tuple(self.page_ids)
        self.page_ids, self._pages = [], None
        self.num_computed = self.num_planned = 0
        self.preemptions += 1
        return page_ids

    def take_pages(self, page_ids: tuple[int, ...]) -> None:
        """Add pages at the end."""
        self.page_ids.extend(page_ids)
        self._pages = None

    def drop_pages(self, kept: int) -> list[int]:
        """Keep the first `kept` pages, and return the others, which the caller must release."""
        dropped = self.page_ids[kept:]
        del self.page_ids[kept:]
        self._pages = None
        return dropped

    def draft(self, count: int) -> tuple[int, ...]:
        """Guess the tokens that follow the known ones: at most `count`, and never the last token that is allowed.

        A step draws one token more than it accepts drafts, so a draft of the last token would be wasted.
        """
        count = max(0, min(count, self.sampling.max_tokens - self.num_generated - 1))
        return self._proposed[:count] if self._lookup is None else self._lookup.propose(count)

    def plan(self, count: int, drafts: tuple[int, ...] = ()) -> ScheduledRequest:
        """Put the next `count` tokens in flight. If they are the last tokens, the step samples from them.

        `drafts` may follow only the last tokens, and only if nothing is in flight.
        """
        start, end = self.num_planned, self.num_planned + count
        # Targets begin with the step's first row and end with the prompt, so target i belongs to row i. If rows
        # are recomputed whose logprobs are known, `accept` drops the repeated ones.
        if self._pages is None:
            self._pages = tuple(self.page_ids)
        targets: list[int] = []
        if self.sampling.prompt_logprobs is not None:
            known, last = self._last_scored, min(end, self.num_prompt - 1)
            targets = self.token_ids[start + 1 : last + 1] if known < last else []
        tokens = (*self.token_ids[start:end], *drafts)
        scheduled = ScheduledRequest(
            request_id=self.request_id,
            token_ids=(*tokens, PENDING) if end > len(self.token_ids) else tokens,
            num_drafts=len(drafts),
            next_token_id=self.token_ids[end] if end < len(self.token_ids) else None,
            start=start,
            page_ids=self._pages,
            index_top_k=self.index_top_k,
            sample=self._sample_spec() if end == self.num_tokens else None,
            prompt_targets=tuple(targets),
            prompt_alternatives=(self.sampling.prompt_logprobs or 0) if targets else 0,
        )
        self.num_planned = end
        self.num_pending += scheduled.sample is not None
        return scheduled

    def accept(self, scheduled: ScheduledRequest, sampled: Sampled, now: float) -> Delta | None:
        """Apply one step's result. Return the delta for the client, or None if there is none.

        Raises:
            ValueError: the result does not answer what was scheduled.
        """
        if sampled.error is not None:
            return self.end("error", now, error=sampled.error)
        self._refuse_mismatch(scheduled, sampled)
        if sampled.prompt_logprobs:
            known = self._last_scored - scheduled.start
            self._prompt_logprobs.extend(sampled.prompt_logprobs[max(known, 0) :])
        self.num_computed = scheduled.start + len(scheduled.token_ids) - scheduled.num_drafts
        self.peak_computed = max(self.peak_computed, self.num_computed)
        if not sampled.token_ids:
            return None
        self.num_pending -= 1
        ahead = self.num_planned - self.num_computed  # rows of the next step, if it is in flight

        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        first = self._first_token is None
        if first:
            self._first_token = now
            if self.sampling.prompt_logprobs is not None:
                unscored = min(self._first_scored, self.num_prompt)
                prompt_logprobs = (*(None for _ in range(unscored)), *self._prompt_logprobs)
        kept = 0
        reason: FinishReason | None = None
        while reason is None and kept < len(sampled.token_ids):
            token_id = sampled.token_ids[kept]
            kept += 1
            self.token_ids.append(token_id)
            if token_id in self._stop_token_ids:
                reason = "stop"
            elif len(self.token_ids) >= self._most_tokens:
                reason = "length"
        # Every kept token but the last was a draft, so its row is computed. Rows of rejected drafts do not count:
        # the next step begins before them and overwrites them.
        self.num_computed += kept - 1
        self.num_planned = self.num_computed + ahead
        self.peak_computed = max(self.peak_computed, self.num_computed)
        self._proposed = sampled.draft_token_ids
        return Delta(
            request_id=self.request_id,
            token_ids=sampled.token_ids[:kept],
            logprobs=sampled.logprobs[:kept] if self.sampling.logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            usage=self.usage(now) if reason or first else None,
        )

    def end(self, reason: FinishReason, now: float, *, error: str | None = None) -> Delta:
        """Make the terminal delta of a request that ends without a new token."""
        return Delta(request_id=self.request_id, finish_reason=reason, error=error, usage=self.usage(now))

    def usage(self, now: float) -> RequestUsage:
        """What the request has used until `now`. A stage that it did not reach took no time."""
        first_scheduled = now if self._first_scheduled is None else self._first_scheduled
        first_token = now if self._first_token is None else self._first_token
        return RequestUsage(
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens or 0,
            completion_tokens=len(self.token_ids) - self.num_prompt,
            preemptions=self.preemptions,
            index_top_k=self.index_top_k,
            queue_seconds=first_scheduled - self._submitted,
            prefill_seconds=first_token - first_scheduled,
            decode_seconds=now - first_token,
        )

    def _sample_spec(self) -> SampleSpec:
        return SampleSpec(
            params=self.sampling,
            output_index=len(self.token_ids) + self.num_pending - self.num_prompt,
            prompt_len=self.num_prompt,
            history=tuple(self.token_ids) if self._penalised else (),
        )

    def _refuse_mismatch(self, scheduled: ScheduledRequest, sampled: Sampled) -> None:
        tokens = sampled.token_ids
        if (
            len(tokens) == 1
            and scheduled.sample is not None
            and not scheduled.num_drafts
            and not scheduled.prompt_targets
            and not sampled.prompt_logprobs
            and (self.sampling.logprobs is None or len(sampled.logprobs) == 1)
        ):
            return  # nearly all results are one token
        name = f"the result of request {self.request_id!r}"
        if (not tokens) != (scheduled.sample is None):
            raise ValueError(f"{name} must have tokens exactly where they were asked for")
        if (
            len(tokens) > scheduled.num_drafts + 1
            or tokens[:-1] != scheduled.drafts[: max(0, len(tokens) - 1)]
        ):
            raise ValueError(f"{name} must have drafts that held, and one token more")
        if self.sampling.logprobs is not None and len(sampled.logprobs) != len(tokens):
            raise ValueError(f"{name} must have the logprob of each of its tokens, which was asked for")
        if len(sampled.prompt_logprobs) != len(scheduled.prompt_targets):
            raise ValueError(
                f"{name} has {len(sampled.prompt_logprobs)} prompt logprobs for "
                f"{len(scheduled.prompt_targets)} prompt targets"
            )
