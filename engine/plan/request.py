"""The scheduler's record of one request: its tokens, how many are computed, and where.

There are no phases: `num_computed` tokens have their keys and values in `page_ids`, `num_tokens` are known,
and the scheduler closes the gap. Queues, pages and budgets are the scheduler's; this knows what a result
means for its own request.
"""

from __future__ import annotations

from engine.plan.lookup import PromptLookup
from engine.plan.prefix import HashFunction, PageKeys, sha256
from engine.plan.types import Sampled, SampleSpec, ScheduledRequest
from engine.protocol import Delta, FinishReason, RequestUsage, Submit, TokenLogprob


class Request:
    """One live request. Mutable, and owned by the scheduler.

    Args:
        submit: what was asked for.
        arrival: its place in the order of arrival; larger is later.
        now: seconds on the engine's clock.
        hash_function: for the keys of its pages.
        lookup: draft from its own text; otherwise drafts are what results propose.
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
        self.arrival = arrival
        self.num_prompt = len(submit.prompt_token_ids)
        self.token_ids = list(submit.prompt_token_ids)  # prompt, then output
        self.num_computed = 0
        self.peak_computed = 0  # the most that was ever computed: what lies below is recomputation
        self.page_ids: list[int] = []
        self.num_registered = 0  # leading pages that the prefix cache has been told of
        self.keys = PageKeys(
            self.token_ids,
            namespace=submit.namespace,
            index_top_k=submit.index_top_k,
            hash_function=hash_function,
        )
        self.cached_tokens: int | None = None  # found at first admission; None before it
        self.preemptions = 0
        self._lookup = PromptLookup(self.token_ids) if lookup else None
        self._proposed: tuple[int, ...] = ()  # by the newest result, to follow the tokens known now
        self._stop_token_ids = frozenset(submit.sampling.stop_token_ids)
        # The first token follows nothing, so it has no logprob.
        self._first_scored = max(submit.sampling.prompt_logprobs_start, 1)
        self._prompt_logprobs: list[TokenLogprob] = []  # of prompt positions from there on
        self._submitted = now
        self._first_scheduled: float | None = None
        self._first_token: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output so far."""
        return len(self.token_ids)

    @property
    def num_missing(self) -> int:
        """Tokens known but not computed; 1 when decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_reusable(self) -> int:
        """Leading tokens that may come from cached pages.

        One stays to be computed: its row gives the logits of the next. Prompt logprobs need all rows from the one
        before the first that is asked for.
        """
        if self.sampling.prompt_logprobs is None:
            return self.num_tokens - 1
        return min(self._first_scored, self.num_tokens) - 1

    @property
    def _last_scored(self) -> int:
        """The prompt position up to which logprobs are in hand, or need not be."""
        return self._first_scored - 1 + len(self._prompt_logprobs)

    def admit(self, page_ids: tuple[int, ...], cached_tokens: int, now: float) -> None:
        """Start, or start again, from `page_ids`, which hold the first `cached_tokens` tokens."""
        self.page_ids = list(page_ids)
        self.num_registered = len(page_ids)
        self.num_computed = cached_tokens
        if self.cached_tokens is None:
            self.cached_tokens = cached_tokens
            self._first_scheduled = now

    def preempt(self) -> tuple[int, ...]:
        """Forget what is computed, keep every token, and return the pages that are given up."""
        page_ids = tuple(self.page_ids)
        self.page_ids = []
        self.num_computed = 0
        self.preemptions += 1
        return page_ids

    def draft(self, count: int) -> tuple[int, ...]:
        """A guess of the tokens that follow the known ones, at most `count` and never the last one allowed.

        The step draws one token more than it accepts, so a draft of the last one could only be thrown away.
        """
        count = max(0, min(count, self.sampling.max_tokens - self.num_generated - 1))
        return self._proposed[:count] if self._lookup is None else self._lookup.propose(count)

    def plan(self, count: int, drafts: tuple[int, ...] = ()) -> ScheduledRequest:
        """The next `count` tokens as a part of a step; sampled from if they are the last that are known.

        `drafts` may follow only those.
        """
        start, end = self.num_computed, self.num_computed + count
        # Targets begin with the step's first row and end with the prompt, so target i is row i's. Where
        # recomputation repeats rows whose result is in hand, `accept` drops them.
        targets: list[int] = []
        if self.sampling.prompt_logprobs is not None:
            known, last = self._last_scored, min(end, self.num_prompt - 1)
            targets = self.token_ids[start + 1 : last + 1] if known < last else []
        return ScheduledRequest(
            request_id=self.request_id,
            token_ids=(*self.token_ids[start:end], *drafts),
            num_drafts=len(drafts),
            next_token_id=self.token_ids[end] if end < self.num_tokens else None,
            start=start,
            page_ids=tuple(self.page_ids),
            index_top_k=self.index_top_k,
            sample=self._sample_spec() if end == self.num_tokens else None,
            prompt_targets=tuple(targets),
            prompt_alternatives=(self.sampling.prompt_logprobs or 0) if targets else 0,
        )

    def accept(self, scheduled: ScheduledRequest, sampled: Sampled, now: float) -> Delta | None:
        """Take in one step's result; returns what the client must hear of it, if anything.

        Raises:
            ValueError: the result does not answer what was scheduled.
        """
        if sampled.error is not None:
            return self.end("error", now, error=sampled.error)
        self._refuse_mismatch(scheduled, sampled)
        known = self._last_scored - scheduled.start
        self._prompt_logprobs.extend(sampled.prompt_logprobs[max(known, 0) :])
        self.num_computed = scheduled.start + len(scheduled.token_ids) - scheduled.num_drafts
        self.peak_computed = max(self.peak_computed, self.num_computed)
        if not sampled.token_ids:
            return None

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
            elif self.num_generated >= self.sampling.max_tokens:
                reason = "length"
        # Every token but the last kept one was a draft, so its row is computed. Rows of drafts that did not
        # hold are as good as never computed: the next step begins before them and writes over them.
        self.num_computed += kept - 1
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
        """The terminal delta of a request that ends without a new token."""
        return Delta(request_id=self.request_id, finish_reason=reason, error=error, usage=self.usage(now))

    def usage(self, now: float) -> RequestUsage:
        """What it used until `now`; a stage that it did not reach took no time."""
        first_scheduled = now if self._first_scheduled is None else self._first_scheduled
        first_token = now if self._first_token is None else self._first_token
        return RequestUsage(
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens or 0,
            completion_tokens=self.num_generated,
            preemptions=self.preemptions,
            index_top_k=self.index_top_k,
            queue_seconds=first_scheduled - self._submitted,
            prefill_seconds=first_token - first_scheduled,
            decode_seconds=now - first_token,
        )

    def _sample_spec(self) -> SampleSpec:
        params = self.sampling
        penalised = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        )
        return SampleSpec(
            params=params,
            output_index=self.num_generated,
            prompt_len=self.num_prompt,
            history=tuple(self.token_ids) if penalised else (),
        )

    def _refuse_mismatch(self, scheduled: ScheduledRequest, sampled: Sampled) -> None:
        name = f"the result of request {self.request_id!r}"
        tokens = sampled.token_ids
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
