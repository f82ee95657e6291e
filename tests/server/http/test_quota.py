"""Two keys on one server: neither can exhaust the other, nor spend its budget. And each limit as a client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.protocol import Work
from server.access.keys import KeyRecord, KeyTable
from tests.ledger import ledger_rows
from tests.server.access.kit import bearer, code_of, write_keys
from tests.server.fake_engine import FakeEngine
from tests.server.kit import chat_body, client, completion_body, error_of, make_app, say, speaking

MODEL = "deepseek-v3.2"  # USD a million tokens: 0.28, cached 0.028, output 0.42


class Desk:
    """A server with keys, and what it knows."""

    def __init__(self, app: FastAPI, http: httpx.AsyncClient, ledger: Path) -> None:
        self.app, self.http, self.ledger = app, http, ledger

    async def ask(self, name: str, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
        body = chat_body(**fields) if path.endswith("chat/completions") else completion_body(**fields)
        return await self.http.post(path, json=body | {"model": MODEL}, headers=bearer(name))

    def key(self, name: str) -> KeyRecord:
        table: KeyTable = self.app.state.services.keys.table
        return next(record for record in table.keys if record.name == name)

    def spent(self, name: str) -> int:
        spent: int = self.app.state.services.budgets.spent(self.key(name))
        return spent

    def held(self, name: str) -> int:
        held: int = self.app.state.services.budgets.held(self.key(name))
        return held

    def booked(self, name: str) -> int:
        return sum(row["amount_nanos"] for row in ledger_rows(self.ledger) if row["key"] == name)

    async def quiet(self) -> None:
        async with asyncio.timeout(10):
            while self.app.state.services.books.open_accounts or any(  # noqa: ASYNC110 - there is no event
                self.app.state.services.budgets._held.values()
            ):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def desk(
    tmp_path: Path,
    engine: FakeEngine | None = None,
    *,
    config: dict[str, Any] | None = None,
    **keys: dict[str, Any],
) -> AsyncGenerator[Desk, None]:
    file = write_keys(tmp_path / "keys.yaml", **({"alice": {}, "bob": {}} | keys))
    ledger = tmp_path / "usage.sqlite"
    app = make_app(
        engine or speaking(), keys=str(file), ledger=str(ledger), model_name=MODEL, **(config or {})
    )
    async with app.router.lifespan_context(app), client(app) as http:
        yield Desk(app, http, ledger)


async def test_requests_a_minute_are_told_in_headers(tmp_path: Path) -> None:
    async with desk(tmp_path, alice={"requests_per_minute": 2, "tokens_per_minute": 1000}) as here:
        first = await here.ask("alice", max_tokens=10)
        headers = {name: value for name, value in first.headers.items() if name.startswith("x-ratelimit")}
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == "1"
        assert headers["x-ratelimit-limit-tokens"] == "1000"
        assert headers["x-ratelimit-remaining-tokens"] == str(1000 - 3 - 10)  # at worst
        assert 25 < float(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 30
        streamed = await here.ask("alice", max_tokens=10, stream=True)
        assert streamed.headers["x-ratelimit-remaining-requests"] == "0"
        assert int(streamed.headers["x-ratelimit-remaining-tokens"]) >= 1000 - 9 - 13  # the first used 3 + 6
        for path in ("/v1/completions", "/tokenize", "/v1/chat/completions"):
            refused = await here.ask("alice", path)
            error_of(refused, 429, "rate_limit_exceeded")
            assert 25 <= int(refused.headers["retry-after"]) <= 30
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await here.http.get("/v1/models", headers=bearer("alice"))).status_code == 200
        other = await here.ask("bob")
        assert other.status_code == 200
        assert not [name for name in other.headers if name.startswith("x-ratelimit")]


async def test_tokens_a_minute(tmp_path: Path) -> None:
    async with desk(tmp_path, alice={"tokens_per_minute": 50}) as here:
        error_of(await here.ask("alice", max_tokens=100), 400, "tokens_above_limit")
        assert (await here.ask("alice", max_tokens=40)).status_code == 200  # gives back 34
        assert (await here.ask("alice", max_tokens=30)).status_code == 200
        refused = await here.ask("alice", max_tokens=40)
        error_of(refused, 429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) <= 20
        assert (await here.ask("bob", max_tokens=100)).status_code == 200


async def test_requests_at_once(tmp_path: Path) -> None:
    engine = speaking(delay=0.05)
    async with desk(tmp_path, engine, alice={"concurrent": 2}) as here:
        answers = await asyncio.gather(
            *(here.ask("alice") for _ in range(5)), *(here.ask("bob") for _ in range(5))
        )
        codes = [answer.status_code for answer in answers]
        assert sorted(codes[:5]) == [200, 200, 429, 429, 429]
        assert codes[5:] == [200] * 5
        refused = next(answer for answer in answers if answer.status_code == 429)
        error_of(refused, 429, "concurrency_limit")
        assert (await here.ask("alice")).status_code == 200


async def test_one_key_cannot_fill_the_queue(tmp_path: Path) -> None:
    engine = speaking(first_delay=1.0)
    async with desk(tmp_path, engine, config={"max_queue": 8}) as here:
        crowd = [asyncio.create_task(here.ask("alice")) for _ in range(20)]
        await asyncio.sleep(0.5)
        assert here.app.state.services.admission.admitted == 4
        assert (await here.ask("bob")).status_code == 200
        codes = sorted([(await task).status_code for task in crowd])
        assert codes == [200] * 4 + [429] * 16
        many = await here.ask("alice", n=5)
        assert (many.status_code, code_of(many)) == (400, "too_many_choices")
        assert (await here.ask("alice", n=4)).status_code == 200
    assert here.app.state.services.admission._held == {}


async def test_sparsity_of_a_key(tmp_path: Path) -> None:
    engine = speaking()
    keys: dict[str, Any] = {
        "alice": {"top_k": {"min": 4, "max": 16, "dense": False}},
        "bob": {"top_k": {"dense": False}},
    }
    async with desk(tmp_path, engine, **keys) as here:
        for top_k in (2, 17, "dense"):
            chosen: dict[str, Any] = {"dsa": {"top_k": top_k}}
            refused = await here.ask("alice", **chosen)
            error = error_of(refused, 403, "top_k_not_allowed")
            assert error["message"].endswith("it allows 4 to 16, and not dense")
        assert engine.submitted == []
        for own, wanted in ((None, 16), (8, 8)):
            chosen = {} if own is None else {"dsa": {"top_k": own}}
            answer = await here.ask("alice", **chosen)
            assert answer.json()["usage"]["dsa"]["top_k"] == wanted
            assert engine.submitted[-1].index_top_k == wanted
        assert (await here.ask("bob")).json()["usage"]["dsa"]["top_k"] == 32  # the indexer's own


async def test_a_model_that_is_always_dense_is_for_every_key(tmp_path: Path) -> None:
    engine = FakeEngine(lambda submit: say("x"), default_top_k=None)
    async with desk(tmp_path, engine, alice={"top_k": {"dense": False}}) as here:
        assert (await here.ask("alice")).status_code == 200


async def test_a_budget_is_spent_to_the_nano_dollar_and_is_one_keys(tmp_path: Path) -> None:
    # A request: 3 tokens of prompt at 280 and 6 of output at 420 are 3,360; at worst, 3 and 20: 9,244.
    async with desk(
        tmp_path, alice={"budget": {"usd": "0.00002"}}, bob={"budget": {"usd": "0.00002"}}
    ) as here:
        costs = []
        while (answer := await here.ask("alice", max_tokens=20)).status_code == 200:
            costs.append(answer.json()["usage"]["cost_details"]["amount"])
        error_of(answer, 402, "budget_exhausted")
        assert "lower max_tokens" in answer.json()["error"]["message"]
        assert costs == [3360] * 4  # 13,440 spent; 6,560 are left, and a fifth may need 9,244
        assert (await here.ask("alice", max_tokens=6)).status_code == 200
        assert (await here.ask("alice", max_tokens=6)).status_code == 402
        assert here.spent("alice") == here.booked("alice") == 3360 * 5
        assert (here.held("alice"), here.spent("bob")) == (0, 0)
        assert (await here.ask("bob", max_tokens=20)).status_code == 200


async def test_requests_at_once_cannot_overspend(tmp_path: Path) -> None:
    engine = speaking(delay=0.02)
    async with desk(
        tmp_path, engine, alice={"budget": {"usd": "0.00003"}}
    ) as here:  # room for three at worst
        answers = await asyncio.gather(*(here.ask("alice", max_tokens=20) for _ in range(12)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200] * 3 + [429] * 9
        refused = next(answer for answer in answers if answer.status_code == 429)
        error_of(refused, 429, "budget_reserved")
        assert refused.headers["retry-after"] == "2"
        await here.quiet()
        assert here.spent("alice") == here.booked("alice") == 3 * 3360


async def test_a_new_server_knows_what_was_spent(tmp_path: Path) -> None:
    budget = {"budget": {"usd": "0.00001", "period": "month"}}
    async with desk(tmp_path, alice=budget) as here:
        for _ in range(2):
            assert (await here.ask("alice", max_tokens=6)).status_code == 200
        assert (await here.ask("alice", max_tokens=20)).status_code == 402
    async with desk(tmp_path, alice=budget) as here:
        assert here.spent("alice") == here.booked("alice") == 6720
        assert (await here.ask("alice", max_tokens=20)).status_code == 402


@pytest.mark.parametrize("fault", ["error", "die", "refuse", "abort"])
async def test_a_failed_request_gives_everything_back(tmp_path: Path, fault: Any) -> None:
    engine = FakeEngine(lambda submit: say("hello", fault=fault))
    rich = {"budget": {"usd": "0.0001"}, "tokens_per_minute": 1000, "concurrent": 1}
    async with desk(tmp_path, engine, alice=rich) as here:
        assert (await here.ask("alice", max_tokens=20)).status_code >= 500
        assert (await here.ask("alice", max_tokens=20, stream=True)).status_code in (200, 500, 503)
        await here.quiet()
        assert here.spent("alice") == here.booked("alice") == here.held("alice") == 0
        (tokens,) = here.app.state.services.limits.standings(here.key("alice"))
        assert tokens.remaining >= 1000 - 2 * 9  # what was computed counts against the rate


async def test_a_cancelled_request_pays_for_what_was_computed(tmp_path: Path) -> None:
    engine = speaking("a" * 100, delay=0.05, work=Work(rows=5))
    async with desk(tmp_path, engine, alice={"budget": {"usd": "0.001"}, "concurrent": 1}) as here:
        task = asyncio.create_task(here.ask("alice", max_tokens=100))
        await asyncio.sleep(0.4)
        assert here.held("alice") == 3 * 280 + 100 * 420 + 4
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await here.quiet()
        assert here.spent("alice") == here.booked("alice") > 0
        assert here.held("alice") == 0


async def test_a_budget_needs_a_ledger(tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys.yaml", alice={"budget": {"usd": "1"}})
    with pytest.raises(ValueError, match="name one with --ledger"):
        make_app(speaking(), keys=str(file))


async def test_limits_of_a_changed_file_are_those_of_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(tmp_path) as here:
        assert (await here.ask("alice")).status_code == 200
        write_keys(tmp_path / "keys.yaml", alice={"requests_per_minute": 1}, bob={})
        here.app.state.services.keys.refresh()
        assert (await here.ask("alice")).status_code == 200
        assert (await here.ask("alice")).status_code == 429


async def test_a_keys_priority_is_added_to_the_requests(tmp_path: Path) -> None:
    engine = speaking()
    async with desk(tmp_path, engine, alice={"priority": -5}, bob={"priority": 5}) as here:
        for name, own, wanted in (
            ("alice", 0, -5),
            ("alice", 3, -2),
            ("bob", 0, 5),
            ("bob", 2**31 - 1, 2**31 - 1),
        ):
            fields: dict[str, Any] = {"priority": own}
            assert (await here.ask(name, **fields)).status_code == 200
            assert engine.submitted[-1].priority == wanted
        early: dict[str, Any] = {"priority": -1}
        assert (await here.ask("bob", **early)).status_code == 400  # nobody steps forward by itself


async def test_tokens_of_prompts_that_wait_are_bounded(tmp_path: Path) -> None:
    engine = speaking(first_delay=0.5)
    async with desk(tmp_path, engine, config={"max_queue_tokens": 100}) as here:
        long = asyncio.create_task(here.ask("alice", prompt="a" * 90))
        await asyncio.sleep(0.2)
        refused = await here.ask("bob", prompt="b" * 20)
        error_of(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await here.ask("bob", prompt="b")).status_code == 200  # there is room for this one
        assert (await long).status_code == 200
        assert (await here.ask("bob", prompt="b" * 200)).status_code == 200  # alone it may be longer
