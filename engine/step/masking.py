"""Follows answers through their grammars, and says before each draw which tokens may be drawn.

A grammar says what may follow once the tokens before are known. So masks are made after the result of the step before,
and before the draw. A runner that takes plans ahead has begun to compute the rows meanwhile (`engine.step.core`).

Drafts are verified under masks, too: the row after a draft has the mask of the grammar's place after that draft. A draft that
the grammar does not allow is never drawn, so it and what follows are dropped.

On the host a draw asks about a few tokens first, and needs the mask only if these do not tell (`engine.step.foresight`). So
such masks are late: computed when the draw asks for them.

Masks are computed on threads. If one takes too long, its request ends with an error, and the others go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import GRAMMAR_FAULT, GrammarError
from engine.grammar import MaskWords, Matcher
from engine.plan.types import ScheduledRequest, StepPlan
from engine.protocol import Delta, Grammar

DEADLINE_SECONDS = 0.25
"""A step waits no longer for its masks, which usually take 0.1 ms each."""

MASK_SECONDS = 0.005
"""The time that a mask may take on average, on one core."""

SPARE_SECONDS = 0.25
"""A request may take so much more than the average allows: the first masks of a grammar are its slowest."""

_THREADS = min(4, os.cpu_count() or 1)
_FEW = 8
"""So many requests are computed on one thread: to wake more would take longer."""

_ANY, _FIRST_LATE = -1, -2


class LateMasks(Protocol):
    """Masks that are computed when a draw needs them; a question about one token is answered before."""

    def allows(self, number: int, token_id: int) -> bool:
        """Whether a mask allows a token; False if there is no time left to find out."""
        ...

    def compute(self, numbers: Sequence[int]) -> list[MaskWords | str]:
        """Compute masks: each [W], or why there is none."""
        ...


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens a step may draw.

    Attributes:
        words: [M, W]: bit t % 32 of word t // 32 says whether token t may be drawn.
        of: [N], for each row that is drawn from, in the plan's order: its mask's number; -1: any token; -2 - n: the
            mask is the n-th of `late`.
        late: masks that are not computed yet, only for a draw on the host.
    """

    words: NDArray[np.int32]
    of: NDArray[np.int32]
    late: LateMasks | None = None

    def part(self, rows: Sequence[int]) -> TokenMasks | None:
        """The masks of some rows; None if none of them has one."""
        of = self.of[list(rows)]
        return TokenMasks(self.words, of, self.late) if (of != _ANY).any() else None

    def rule(self, row: int) -> Callable[[int], bool] | None:
        """Whether a row may draw a token, if its mask is late; None: it is computed, or there is none."""
        number = _FIRST_LATE - int(self.of[row])
        return None if self.late is None or number < 0 else partial(self.late.allows, number)

    def computed(self, rows: Sequence[int]) -> tuple[TokenMasks, dict[int, str]]:
        """Compute the late masks of some rows. Return masks that have these, and why rows have none."""
        assert self.late is not None
        of, words, failed = self.of.copy(), list(self.words), dict[int, str]()
        for row, mask in zip(
            rows, self.late.compute([_FIRST_LATE - int(of[row]) for row in rows]), strict=True
        ):
            if isinstance(mask, str):
                failed[row] = mask
            else:
                of[row] = len(words)
                words.append(mask)
        return TokenMasks(np.array(words, dtype=np.int32), of, self.late), failed

    def words_of(self, row: int) -> MaskWords | None:
        """A row's mask; None: it may draw any token."""
        mask = int(self.of[row])
        return None if mask == _ANY else self.words[mask]


class Masking:
    """The live answers that have a grammar."""

    def __init__(self) -> None:
        self._live: dict[str, _Answer] = {}
        self._threads: ThreadPoolExecutor | None = None

    def __bool__(self) -> bool:
        return bool(self._live)

    def open(self, request_id: str, grammar: Grammar, matcher: Matcher) -> None:
        """Follow a new answer."""
        self._live[request_id] = _Answer(matcher, frozenset(grammar.after))

    def masks(self, plan: StepPlan, *, late: bool = False) -> tuple[TokenMasks | None, dict[str, str]]:
        """The masks of a plan whose tokens are all known, and why requests failed that have none.

        The masks are None if every row may draw any token.

        Args:
            plan: the step's
            late: compute the masks of requests without drafts only when a draw asks for them
        """
        asked: list[tuple[str, int, tuple[int, ...]]] = []
        waiting: list[tuple[str, int]] = []
        count = 0
        for request in plan.requests:
            if request.sample is not None:
                if request.request_id in self._live:
                    if late and not request.num_drafts:
                        waiting.append((request.request_id, count))
                    else:
                        asked.append((request.request_id, count, request.drafts))
                count += 1 + request.num_drafts
        results: list[_Result | None] = [None] * len(asked)
        self._compute([(self._live[name], drafts) for name, _, drafts in asked], results)
        words: list[MaskWords] = []
        of = np.full(count, -1, dtype=np.int32)
        failed: dict[str, str] = {}
        for (name, first, _), result in zip(asked, results, strict=True):
            if not isinstance(result, list):
                failed[name] = f"{GRAMMAR_FAULT}: {result or _SLOW}"
                continue
            for row, mask in enumerate(result, first):
                if mask is not None:
                    of[row] = len(words)
                    words.append(mask)
        places: list[_Answer] = []
        for name, row in waiting:
            try:
                if self._live[name].advance():
                    of[row] = _FIRST_LATE - len(places)
                    places.append(self._live[name])
            except GrammarError as error:
                failed[name] = f"{GRAMMAR_FAULT}: {error}"
        if not words and not places:
            return None, failed
        return TokenMasks(
            np.array(words, dtype=np.int32), of, _Late(self, places) if places else None
        ), failed

    def compute(self, answers: Sequence[_Answer]) -> list[MaskWords | str]:
        """The next masks of answers that have begun: each [W], or why there is none."""
        results: list[_Result | None] = [None] * len(answers)
        self._compute([(answer, ()) for answer in answers], results)
        masks: list[MaskWords | str] = []
        for result in results:
            mask = result[0] if isinstance(result, list) else None
            masks.append(f"{GRAMMAR_FAULT}: {result or _SLOW}" if mask is None else mask)
        return masks

    def accept(self, deltas: Iterable[Delta]) -> None:
        """Go on by the tokens that were drawn, and forget the answers that have ended."""
        for delta in deltas:
            if (answer := self._live.get(delta.request_id)) is not None:
                if delta.finish_reason is not None:
                    del self._live[delta.request_id]
                else:
                    answer.take(delta.token_ids)

    def of(self, plan: StepPlan) -> Iterator[ScheduledRequest]:
        """The requests of a plan that draw a token under a grammar."""
        live = self._live
        return (one for one in plan.requests if one.sample is not None and one.request_id in live)

    def _compute(self, jobs: list[tuple[_Answer, tuple[int, ...]]], results: list[_Result | None]) -> None:
        """Fill the results, each with masks or an error; those that take too long stay None."""
        left = _shares(len(jobs))
        while left:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="masks")
            turn = _Turn(jobs, results)
            futures = {self._threads.submit(turn.work, numbers): numbers for numbers in left}
            wait(futures, DEADLINE_SECONDS)
            left = []
            late = False
            for future, numbers in futures.items():
                if future.done():
                    future.result()  # raises what is no GrammarError
                    continue
                # The first without a result is the one that takes too long. Those behind it go to other threads.
                late = True
                first = next((i for i, n in enumerate(numbers) if results[n] is None), len(numbers))
                left += [numbers[first + 1 :]] if numbers[first + 1 :] else []
            if late:
                turn.over = True
                self._threads.shutdown(wait=False, cancel_futures=True)
                self._threads = None


_Result = list[MaskWords | None] | str
_SLOW = "its next token takes too long to find"


def _shares(count: int) -> list[range]:
    """Divide `count` jobs over threads."""
    threads = _THREADS if count > _FEW else 1
    return [range(part, count, threads) for part in range(min(threads, count))]


class _Turn:
    """The computing of some answers' masks, until it is over. What a thread computes after that has no place."""

    def __init__(
        self, jobs: Sequence[tuple[_Answer, tuple[int, ...]]], results: list[_Result | None]
    ) -> None:
        self._jobs, self._results = jobs, results
        self.over = False

    def work(self, numbers: range) -> None:
        for number in numbers:
            answer, drafts = self._jobs[number]
            try:
                result: _Result = answer.ahead(drafts)
            except GrammarError as error:
                result = str(error)
            if self.over:
                return
            self._results[number] = result


class _Answer:
    """One answer's place in its grammar."""

    def __init__(self, matcher: Matcher, after: frozenset[int]) -> None:
        self._matcher, self._after = matcher, after
        self._begun = not after
        self._taken: list[int] = []  # tokens that the matcher has not consumed
        self._seconds = 0.0
        self._masks = 0

    def take(self, token_ids: Sequence[int]) -> None:
        self._taken += token_ids

    def ahead(self, drafts: Sequence[int]) -> list[MaskWords | None]:
        """The masks of the next token, and of those after each of the drafts; None: any token.

        There may be fewer than drafts: the rows after a draft that the grammar does not allow need none.
        """
        began = time.thread_time()
        self._consume()
        masks: list[MaskWords | None] = []
        if not self._begun:
            place = next((i + 1 for i, draft in enumerate(drafts) if draft in self._after), None)
            masks += [None] * (1 + len(drafts) if place is None else place)
            drafts = () if place is None else drafts[place:]
            if place is None:
                return masks
        masks += self._matcher.ahead(drafts)
        self._charge(began, len(masks))
        return masks

    def advance(self) -> bool:
        """Go on by the tokens that were drawn; return whether the grammar has begun.

        Raises:
            GrammarError: one of them is not allowed, or it takes too much.
        """
        began = time.thread_time()
        self._consume()
        self._charge(began, int(self._begun))
        return self._begun

    def allows(self, token_id: int) -> bool:
        """Whether the next token may be this one, provided that the grammar has begun."""
        if self._is_slow():
            return False
        began = time.thread_time()
        try:
            return self._matcher.allows(token_id)
        except GrammarError:
            return False  # its mask will say why
        finally:
            self._seconds += time.thread_time() - began

    def _charge(self, began: float, masks: int) -> None:
        self._masks += masks
        self._seconds += time.thread_time() - began
        if self._is_slow():
            raise GrammarError("its tokens take too long to find")

    def _is_slow(self) -> bool:
        return self._seconds > SPARE_SECONDS + MASK_SECONDS * self._masks

    def _consume(self) -> None:
        taken, self._taken = self._taken, []
        for token_id in taken:
            if self._begun:
                self._matcher.consume(token_id)
            else:
                self._begun = token_id in self._after


class _Late:
    """The masks of answers, computed when a draw needs them."""

    def __init__(self, masking: Masking, answers: Sequence[_Answer]) -> None:
        self._masking, self._answers = masking, answers

    def allows(self, number: int, token_id: int) -> bool:
        return self._answers[number].allows(token_id)

    def compute(self, numbers: Sequence[int]) -> list[MaskWords | str]:
        return self._masking.compute([self._answers[number] for number in numbers])
