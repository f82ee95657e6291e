"""One engine's answers to the same prompts in several situations, for holding them against each other to the bit."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.plan.meter import Meter
from engine.plan.scheduler import Scheduler
from engine.protocol import EngineStats, IndexTopK, SamplingParams, Submit
from engine.step.build import Built
from engine.step.core import EngineCore

COMPANY = 8
"""Requests that run together."""


@dataclass(frozen=True)
class Prompt:
    """A request."""

    token_ids: tuple[int, ...]
    index_top_k: IndexTopK
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Answer:
    """What came back: each token, and the bits of its log-probabilities."""

    tokens: list[int]
    logprobs: list[bytes]


Answers = list[Answer]


class Engine:
    """A built engine, with a new scheduler for each situation; what earlier ones left in the cache is unknown to it."""

    def __init__(self, built: Built) -> None:
        self._built = built
        self.stats = EngineStats()  # of the last scheduler

    def _core(
        self, *, pages: int | None = None, budget: int = 512, caching: bool = False, **drafting: Any
    ) -> EngineCore:
        built = self._built
        scheduler = Scheduler(
            pages or built.ready.capacity.num_pages,
            token_budget=budget,
            max_running=COMPANY,
            max_model_len=built.ready.model.max_model_len,
            prefix_caching=caching,
            **drafting,
        )
        sparse = built.ready.model.indexer is not None
        runner = built.runner if drafting else built.ahead or built.runner
        return EngineCore(scheduler, runner, Meter(built.costs), sparse=sparse)

    def _run(self, core: EngineCore, prompts: Sequence[Prompt]) -> Answers:
        """All at once."""
        answers = [Answer([], []) for _ in prompts]
        for number, prompt in enumerate(prompts):
            params = SamplingParams(
                max_tokens=prompt.max_tokens, seed=prompt.seed, temperature=prompt.temperature, logprobs=3
            )
            refused = core.submit(
                Submit(
                    request_id=str(number),
                    prompt_token_ids=prompt.token_ids,
                    sampling=params,
                    index_top_k=prompt.index_top_k,
                )
            )
            assert not refused, refused
        while core.has_work:
            output = core.step()
            assert output is not None
            for delta in output.deltas:
                assert delta.error is None, delta.error
                answers[int(delta.request_id)].tokens += delta.token_ids
                for one in delta.logprobs or ():
                    values = [one.logprob, *(value for _, value in one.top)]
                    answers[int(delta.request_id)].logprobs.append(struct.pack(f"{len(values)}f", *values))
        self.stats = core.stats()
        return answers

    def alone(self, prompts: Sequence[Prompt]) -> Answers:
        """One after another, each prompt in one step."""
        return [self._run(self._core(budget=4096), [prompt])[0] for prompt in prompts]

    def in_company(self, prompts: Sequence[Prompt]) -> Answers:
        """Eight at a time, whose prompts share steps."""
        return self._run(self._core(), prompts)

    def chunked(self, prompts: Sequence[Prompt]) -> Answers:
        """One after another, in chunks that begin anywhere."""
        return [self._run(self._core(budget=37), [prompt])[0] for prompt in prompts]

    def on_a_hit(self, prompts: Sequence[Prompt]) -> Answers:
        """Each once more, after the whole pages of its prompt are cached."""
        core = self._core(caching=True)
        self._run(core, prompts)
        before = core.stats().prefix_hits_total
        answers = [self._run(core, [prompt])[0] for prompt in prompts]
        assert core.stats().prefix_hits_total > before
        return answers

    def after_preemptions(self, prompts: Sequence[Prompt]) -> Answers:
        """With so few pages that running requests give them up, and are computed again in one piece."""
        longest = max(len(prompt.token_ids) + prompt.max_tokens for prompt in prompts)
        answers = self._run(self._core(pages=longest // 64 + 2), prompts)
        assert self.stats.preemptions_total > 0
        return answers

    def with_drafts(self, prompts: Sequence[Prompt]) -> Answers:
        """Several rows of an answer in one step, some of them wrong."""
        answers = self._run(self._core(draft_tokens=4, lookup=True), prompts)
        assert self.stats.draft_tokens_total > 0
        return answers

    @property
    def situations(self) -> dict[str, Callable[[Sequence[Prompt]], Answers]]:
        """All but `alone`."""
        return {
            "in company": self.in_company,
            "chunked": self.chunked,
            "on a prefix hit": self.on_a_hit,
            "after preemptions": self.after_preemptions,
            "with drafts": self.with_drafts,
        }


def differing(found: Answers, wanted: Answers) -> tuple[int, int]:
    """How many answers have other tokens, and how many have other bits in their log-probabilities."""
    pairs = list(zip(found, wanted, strict=True))
    return sum(a.tokens != b.tokens for a, b in pairs), sum(a.logprobs != b.logprobs for a, b in pairs)
