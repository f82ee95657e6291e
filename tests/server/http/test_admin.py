"""Settings that change while the server runs: who may, what follows, and what is written down."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.access.kit import bearer, write_keys
from tests.server.fake_engine import FakeEngine
from tests.server.kit import client, completion_body, error_of, make_app, speaking

SETTINGS = "/admin/settings"
TABLE: dict[str, Any] = {
    "version": "live-1",
    "currency": "USD",
    "machine_hour": "1",
    "prices": [
        {
            "model": "*",
            "valid_from": "2025-01-01T00:00:00Z",
            "tokens": {"prompt_cached": "1", "prompt_uncached": "2", "completion": "3"},
        }
    ],
}


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    yield
    root.setLevel(before)


@pytest.fixture
def engine() -> FakeEngine:
    return speaking()


@pytest.fixture
async def http(tmp_path: Path, engine: FakeEngine) -> AsyncGenerator[httpx.AsyncClient, None]:
    keys = write_keys(tmp_path / "keys.yaml", root={"role": "admin"}, user={})
    app = make_app(engine, keys=str(keys))
    async with app.router.lifespan_context(app), client(app) as http:
        yield http


async def change(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.patch(SETTINGS, json=fields, headers=bearer("root"))


async def ask(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/completions", json=completion_body(**fields), headers=bearer("user"))


async def test_only_an_admin_may(http: httpx.AsyncClient) -> None:
    for method, path in (("GET", SETTINGS), ("PATCH", SETTINGS), ("GET", "/admin/changes")):
        error_of(await http.request(method, path, json={"max_n": 1}), 401, "invalid_api_key")
        error_of(
            await http.request(method, path, json={"max_n": 1}, headers=bearer("user")), 403, "forbidden"
        )
    assert (await http.get(SETTINGS, headers=bearer("root"))).json()["max_n"] == 8
    async with client(make_app(speaking())) as open_server:
        error_of(await open_server.patch(SETTINGS, json={"max_n": 1}), 403, "forbidden")


async def test_changes_hold_from_the_next_request_on(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await ask(http, n=4)).status_code == 200
    changed = await change(
        http, max_n=2, max_prompts=1, top_k=7, max_tokens=3, max_queue=10, max_queue_tokens=500
    )
    assert changed.status_code == 200
    assert (changed.json()["max_n"], changed.json()["top_k"]) == (2, 7)
    assert (await ask(http, n=4)).status_code == 400
    assert (await ask(http, prompt=["a", "b"])).status_code == 400
    answer = (await ask(http)).json()
    assert engine.submitted[-1].index_top_k == 7
    assert answer["usage"]["completion_tokens"] == 3
    for top_k, wanted in (("dense", None), (None, 32)):
        assert (await change(http, top_k=top_k)).status_code == 200
        await ask(http)
        assert engine.submitted[-1].index_top_k == wanted
    assert (await change(http, max_queue=1)).status_code == 200
    assert (await ask(http, n=2)).status_code == 400
    assert (await change(http, request_seconds=1e-9)).status_code == 200
    error_of(await ask(http), 408, "deadline_exceeded")
    now = (await http.get(SETTINGS, headers=bearer("root"))).json()
    assert (now["max_queue"], now["max_queue_tokens"]) == (1, 500)  # what was not sent stayed


async def test_prices_change(http: httpx.AsyncClient) -> None:
    assert (await change(http, prices=TABLE)).json()["price_version"] == "live-1"
    cost = (await ask(http)).json()["usage"]["cost_details"]
    assert (cost["price_version"], cost["amount"]) == ("live-1", 3 * 2000 + 6 * 3000)
    other = TABLE | {"machine_hour": "2"}
    for table in (other, {"version": "x"}, TABLE | {"version": "y", "prices": []}):
        refused = await change(http, prices=table, max_n=1)
        assert error_of(refused, 400)["param"] == "prices"
    now = (await http.get(SETTINGS, headers=bearer("root"))).json()
    assert (now["price_version"], now["max_n"]) == ("live-1", 8)  # nothing of a bad change holds


@pytest.mark.parametrize(
    "fields",
    [{"max_n": 0}, {"max_n": None}, {"max_que": 5}, {"max_n": "3"}, {"log_level": "loud"}, {"request_seconds": -1},
     {"top_k": 0}, {"max_queue": 5, "port": 1}],
)  # fmt: skip
async def test_bad_values_change_nothing(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    before = (await http.get(SETTINGS, headers=bearer("root"))).json()
    error_of(await change(http, **fields), 400)
    assert (await http.get(SETTINGS, headers=bearer("root"))).json() == before
    assert (await http.get("/admin/changes", headers=bearer("root"))).json()["data"] == []


async def test_changes_are_written_down(http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    answer = await change(http, log_level="error", max_n=3)
    assert answer.json()["log_level"] == "error"
    await change(http, max_n=3)  # no change
    await change(http, max_n=4)  # told, though the log only has errors now
    told = [record for record in caplog.records if record.name == "server.audit"]
    assert [record.getMessage() for record in told][-1] == "the admin root changed max_n from 3 to 4"
    fields: dict[str, Any] = told[0].__dict__["fields"]
    assert fields["key"] == "root"
    assert fields["request_id"] == answer.headers["x-request-id"]
    data = (await http.get("/admin/changes", headers=bearer("root"))).json()["data"]
    assert [(one["setting"], one["old"], one["new"]) for one in data if one["setting"] == "max_n"] == [
        ("max_n", 8, 3),
        ("max_n", 3, 4),
    ]
    assert "secret-" not in caplog.text + str(data)
