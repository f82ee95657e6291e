"""The canary against an engine whose answers change: what it says, and what it leaves alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec
import pytest

from engine.client import EngineState, EngineStatus, Hear, Settled
from engine.errors import EngineDiedError
from engine.protocol import Delta, EngineStats, FinishReason, RequestUsage, Submit, TokenLogprob
from server.canary import LOWEST, Canary, Said, difference
from tests.server.kit import TEXT, client, make_app, speaking


@dataclass
class Engine:
    """Answers each request at once with the next of its answers."""

    answers: list[list[int] | str]
    margin: float = 5.0
    company: int = 0
    submitted: list[Submit] = field(default_factory=list)
    status: EngineStatus = field(default_factory=lambda: EngineStatus(state=EngineState.READY, pid=1))

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def submit(self, request: Submit, hear: Hear, settled: Settled | None = None) -> None:
        self.submitted.append(request)
        stats = self.status.stats
        self.status = msgspec.structs.replace(
            self.status,
            stats=EngineStats(
                steps_total=stats.steps_total + 1,
                batch_requests_total=stats.batch_requests_total + 1 + self.company,
            ),
        )
        answer = self.answers.pop(0)
        asyncio.get_running_loop().call_soon(self._answer, answer, request, hear, settled)

    def _answer(self, answer: list[int] | str, request: Submit, hear: Hear, settled: Settled | None) -> None:
        error = answer if isinstance(answer, str) else None
        token_ids = () if isinstance(answer, str) else tuple(answer)
        reason: FinishReason = "length" if error is None else "error"
        usage = RequestUsage(
            prompt_tokens=len(request.prompt_token_ids), cached_tokens=0, completion_tokens=len(token_ids),
            preemptions=0, index_top_k=None, queue_seconds=0, prefill_seconds=0, decode_seconds=0,
        )  # fmt: skip
        if error == "die":
            hear(EngineDiedError("the engine died"))
        else:
            told = tuple(
                TokenLogprob(token_id=t, logprob=0.0, rank=1, top=((t, 0.0), (99, -self.margin)))
                for t in token_ids
            )
            hear(
                Delta(
                    request_id=request.request_id, token_ids=token_ids, logprobs=told, finish_reason=reason,
                    error=error, usage=usage,
                )
            )  # fmt: skip
        if settled is not None:
            settled(request.request_id, usage)


def canary(engine: Engine) -> Canary:
    return Canary(engine, TEXT, 60, lambda outcome: None)


async def test_answers_that_agree() -> None:
    engine = Engine([[1, 2, 3]] * 4)
    bird = canary(engine)
    assert [await bird.once(), await bird.once()] == ["agree", "agree"]
    assert bird.problem is None
    salts = [one.cache_salt for one in engine.submitted]
    assert salts[0] == salts[1] != salts[2] == salts[3]
    assert len({one.prompt_token_ids for one in engine.submitted}) == 1
    assert all(one.sampling.temperature == 0 and one.priority == LOWEST for one in engine.submitted)
    assert len(engine.submitted[0].prompt_token_ids) > 128  # so that the second one finds pages


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([[1, 2, 3], [1, 4, 3]], "on its cached prefix, from token 1 on"),
        ([[1, 2, 3], [1, 2]], "on its cached prefix, from token 2 on"),
        ([[1, 2, 3], [1, 2, 3], [5, 2, 3], [5, 2, 3]], "than at the engine's start, from token 0 on"),
    ],
)
async def test_an_answer_that_changes(answers: list[list[int] | str], words: str) -> None:
    engine = Engine(list(answers))
    bird = canary(engine)
    outcomes = [await bird.once() for _ in range(len(answers) // 2)]
    assert outcomes[-1] == "disagree"
    assert bird.problem is not None
    assert words in bird.problem
    engine.answers = [[1, 2, 3]] * 2
    assert await bird.once() == "agree"
    assert bird.problem is None


async def test_an_error_is_a_failure() -> None:
    bird = canary(Engine(["the model's logits are not finite"]))
    assert await bird.once() == "failed"
    assert bird.problem is not None
    assert "not finite" in bird.problem


@pytest.mark.parametrize("answers", [[[1], "die"], ["die"]])
async def test_an_engine_that_dies_is_no_fault_of_its_answers(answers: list[list[int] | str]) -> None:
    bird = canary(Engine(answers))
    assert await bird.once() == "company"
    assert bird.problem is None


async def test_in_company_nothing_is_compared() -> None:
    bird = canary(Engine([[1], [2]], company=1))
    assert await bird.once() == "company"
    assert bird.problem is None


async def test_a_new_engine_begins_anew() -> None:
    engine = Engine([[1], [1], [2], [2]])
    bird = canary(engine)
    assert await bird.once() == "agree"
    engine.status = EngineStatus(state=EngineState.READY, pid=2)
    assert await bird.once() == "agree"


def test_near_ties_end_the_comparison() -> None:
    def said(token_ids: tuple[int, ...], *margins: float) -> Said:
        return Said(token_ids, margins, 0)

    assert difference(said((1, 2, 3), 5, 5, 5), said((1, 2, 3), 5, 5, 5)) is None
    assert difference(said((1, 2, 3), 5, 0.1, 5), said((1, 7, 8), 5, 0.2, 5)) is None
    assert difference(said((1, 2, 3), 5, 0.3, 5), said((1, 7, 8), 5, 0.3, 5)) == 1


async def test_an_operator_is_told() -> None:
    app = make_app(speaking(), canary_interval=60)
    bird = app.state.services.canary
    assert isinstance(bird, Canary)
    async with client(app) as http:
        assert (await http.get("/health/ready")).json()["warnings"] == []
        bird.problem = "the canary is silent"
        ready = await http.get("/health/ready")
        assert (ready.status_code, ready.json()["warnings"]) == (200, ["the canary is silent"])
        text = (await http.get("/metrics")).text
    assert 'dsa_canary_runs_total{outcome="disagree"} 0.0' in text
    assert make_app(speaking()).state.services.canary is None
