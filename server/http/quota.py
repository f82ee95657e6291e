"""Holds a request to what its key allows: sparsity, tokens a minute, money. Says so in headers and errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import msgspec

from server.access.budget import Budgets, BudgetSpentError, Demand
from server.access.keys import Caller, KeyRecord
from server.access.limits import LimitError, Limits, NeverError
from server.generation.admission import QueueFullError, TooLargeError
from server.generation.choice import Job
from server.generation.intake import Admitted
from server.http.protocol.errors import RATE_LIMIT, ApiError, bad_request
from server.money.accounting import Settlement

QUOTA_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}"
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
)


def standing_headers(limits: Limits, record: KeyRecord) -> dict[str, str]:
    """The headers that say how much a key has left, under OpenAI's names."""
    headers: dict[str, str] = {}
    for one in limits.standings(record):
        headers[f"x-ratelimit-limit-{one.kind}"] = str(one.limit)
        headers[f"x-ratelimit-remaining-{one.kind}"] = str(one.remaining)
        headers[f"x-ratelimit-reset-{one.kind}"] = _duration(one.reset)
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 0s, 250ms, 12.5s, 1m0s."""
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 1000) / 1000:g}s"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s"


@contextmanager
def quota_errors() -> Iterator[None]:
    """Turn what a key does not allow into HTTP errors."""
    try:
        yield
    except LimitError as error:
        raise ApiError(
            429,
            str(error),
            kind=RATE_LIMIT,
            code=error.code,
            headers={"retry-after": str(max(math.ceil(error.retry_after), 1))},
        ) from None
    except NeverError as error:
        raise bad_request(str(error), param="max_tokens", code="tokens_above_limit") from None
    except BudgetSpentError as error:
        raise ApiError(402, str(error), kind="insufficient_quota", code="budget_exhausted") from None


@contextmanager
def admission_errors() -> Iterator[None]:
    """Turn the errors of admission into HTTP errors."""
    try:
        yield
    except TooLargeError as error:
        raise bad_request(str(error), param="n", code="too_many_choices") from None
    except QueueFullError as error:
        raise ApiError(
            429,
            str(error),
            kind=RATE_LIMIT,
            code="queue_full",
            headers={"retry-after": str(math.ceil(error.retry_after))},
        ) from None


def fitted(work: Admitted, caller: Caller) -> Admitted:
    """The work as its caller may have it: with its own cached prompts, and as sparse as its key says.

    A request that does not choose its sparsity gets the allowed one that is nearest to the server's default.

    Raises:
        ApiError: 403, the request chose a sparsity that the key does not allow.
    """
    index_top_k, sparsity = work.sparsity.index_top_k, work.sparsity
    allowed = caller.record.top_k if caller.record is not None else None
    if allowed is not None and sparsity.possible and not allowed.allows(index_top_k):
        if sparsity.chosen:
            raise ApiError(
                403,
                f"the key {caller.name} does not allow dsa.top_k {index_top_k or 'dense'}; it allows {allowed}",
                kind="permission_error",
                param="dsa.top_k",
                code="top_k_not_allowed",
            )
        index_top_k = allowed.nearest(index_top_k)
    step = caller.record.priority if caller.record is not None else 0
    jobs = tuple(
        replace(
            job,
            submit=msgspec.structs.replace(
                job.submit,
                cache_salt=caller.salt(job.submit.cache_salt),
                index_top_k=index_top_k,
                priority=min(max(job.submit.priority + step, -(2**31)), 2**31 - 1),
            ),
        )
        for job in work.jobs
    )
    return replace(work, jobs=jobs, sparsity=replace(sparsity, index_top_k=index_top_k))


class Reservation:
    """What one request has reserved of its key's tokens and money.

    Attributes:
        owned: an account has it, and ends it when it is closed.
    """

    def __init__(
        self, limits: Limits, budgets: Budgets | None, record: KeyRecord | None, jobs: Sequence[Job]
    ) -> None:
        """Reserve for the worst case.

        Raises:
            LimitError, NeverError, BudgetSpentError: the key does not allow it; nothing is reserved.
        """
        self.owned = False
        self._end_money: Callable[[], None] | None = None
        self._over = record is None
        if record is None:
            return
        demand = Demand(
            sum(len(job.submit.prompt_token_ids) for job in jobs if not job.shares_prompt),
            sum(job.submit.sampling.max_tokens for job in jobs),
            jobs[0].submit.index_top_k,
        )
        self._give_back = limits.take_tokens(record, demand.prompt + demand.completion)
        try:
            if budgets is not None:
                self._end_money = budgets.reserve(record, demand)
        except BaseException:
            self._give_back(0)
            raise

    def end(self, entry: Settlement | None) -> None:
        """Give back what was not used; None: nothing was. Idempotent."""
        if not self._over:
            self._over = True
            self._give_back(0 if entry is None else entry.prompt_tokens + entry.completion_tokens)
            if self._end_money is not None:
                self._end_money()
