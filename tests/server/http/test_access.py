"""Who is let in: every route without a key, with a wrong one, with one of another role, and with the right one."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.http.access import PROBES
from server.http.routes import ROUTERS
from tests.server.access.kit import bearer, code_of, write_keys
from tests.server.kit import chat_body, client, completion_body, error_of, make_app, speaking

MESSAGE = {"model": "fake-model", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return write_keys(
        tmp_path / "keys.yaml", alice={}, bob={}, root={"role": "admin"}, prom={"role": "metrics"}
    )


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path that the application answers."""
    return [
        (method, path.replace("{response_id}", "resp_x").replace("{model_id:path}", "fake-model"))
        for route in [*app.routes, *(route for router in ROUTERS for route in router.routes)]
        if (path := getattr(route, "path", None)) is not None
        for method in sorted(getattr(route, "methods", None) or {"GET"})
    ]


async def test_every_route_but_the_probes_asks_for_a_key(keys: Path) -> None:
    app = make_app(speaking(), keys=str(keys))
    known = routes(app)
    assert len(known) > 20
    unknown = [("GET", "/nothing"), ("POST", "/v1"), ("GET", "//v1/models"), ("GET", "/v1/../metrics")]
    async with app.router.lifespan_context(app), client(app) as http:
        for method, path in [*known, *unknown]:
            for headers in (
                {},
                {"authorization": "Bearer no"},
                {"authorization": "Basic YTpi"},
                {"x-api-key": "no"},
            ):
                response = await http.request(method, path, headers=headers, json={})
                if path in PROBES:
                    assert response.status_code == 200, (method, path)
                else:
                    assert response.status_code == 401, (method, path)
                    assert response.headers["www-authenticate"].startswith('Bearer realm="dsa-serve"')
                    assert response.headers["x-request-id"]


async def test_a_refusal_has_the_shape_of_its_endpoint(keys: Path) -> None:
    app = make_app(speaking(), keys=str(keys))
    async with app.router.lifespan_context(app), client(app) as http:
        error_of(await http.post("/v1/chat/completions", json=chat_body()), 401, "invalid_api_key")
        refused = await http.post("/v1/messages", json=MESSAGE)
        assert (refused.status_code, refused.json()["type"]) == (401, "error")
        assert refused.json()["error"]["type"] == "authentication_error"
        other = await http.post("/v1/messages", json=MESSAGE, headers=bearer("root"))
        assert (other.status_code, other.json()["error"]["type"]) == (403, "permission_error")
        metrics = (await http.get("/metrics", headers=bearer("prom"))).text
    assert 'dsa_rejections_total{reason="invalid_api_key"} 2.0' in metrics
    assert 'dsa_rejections_total{reason="forbidden"} 1.0' in metrics


async def test_both_headers_carry_a_key(keys: Path) -> None:
    app = make_app(speaking(), keys=str(keys))
    async with app.router.lifespan_context(app), client(app) as http:
        for headers in (
            bearer("alice"),
            {"x-api-key": "secret-alice"},
            {"authorization": "bearer  secret-alice"},
        ):
            for path, body in (("/v1/chat/completions", chat_body()), ("/v1/messages", MESSAGE)):
                assert (await http.post(path, json=body, headers=headers)).status_code == 200


async def test_each_role_opens_its_own_routes_only(keys: Path) -> None:
    app = make_app(speaking(), keys=str(keys))
    async with app.router.lifespan_context(app), client(app) as http:

        async def status(name: str, method: str, path: str) -> int:
            body = completion_body() if method == "POST" else None
            return (await http.request(method, path, json=body, headers=bearer(name))).status_code

        allowed = {
            (name, path): await status(name, method, path)
            for name in ("alice", "root", "prom")
            for method, path in (
                ("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/admin/nothing"),
            )
        }  # fmt: skip
    assert allowed == {
        ("alice", "/v1/completions"): 200, ("alice", "/v1/models"): 200,
        ("alice", "/metrics"): 403, ("alice", "/admin/nothing"): 403,
        ("root", "/v1/completions"): 403, ("root", "/v1/models"): 403,
        ("root", "/metrics"): 200, ("root", "/admin/nothing"): 404,
        ("prom", "/v1/completions"): 403, ("prom", "/v1/models"): 403,
        ("prom", "/metrics"): 200, ("prom", "/admin/nothing"): 403,
    }  # fmt: skip


async def test_metrics_may_be_public(keys: Path) -> None:
    app = make_app(speaking(), keys=str(keys), public_metrics=True)
    async with app.router.lifespan_context(app), client(app) as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/load")).status_code == 401


async def test_without_keys_all_is_open_but_the_admins_routes() -> None:
    app = make_app(speaking())
    async with app.router.lifespan_context(app), client(app) as http:
        assert (await http.get("/v1/models")).status_code == 200
        for headers in ({}, bearer("root")):
            error_of(await http.get("/admin/settings", headers=headers), 403, "forbidden")


async def test_a_preflight_needs_no_key(keys: Path) -> None:
    app = make_app(speaking(), keys=str(keys), allow_origins="https://a.example")
    asked = {"origin": "https://a.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization"}  # fmt: skip
    async with app.router.lifespan_context(app), client(app) as http:
        assert (await http.options("/v1/completions", headers=asked)).status_code == 200
        refused = await http.post("/v1/completions", json={}, headers={"origin": "https://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")


async def test_a_revoked_key_is_refused_and_a_broken_file_is_told(
    keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.app.FOLLOW_SECONDS", 0.01)
    app = make_app(speaking(), keys=str(keys))
    async with app.router.lifespan_context(app), client(app) as http:

        async def until(path: str, done: Any, **headers: Any) -> httpx.Response:
            async with asyncio.timeout(10):
                while not done(  # noqa: ASYNC110 - the file has no event
                    response := await http.get(path, **headers)
                ):
                    await asyncio.sleep(0.01)
            return response

        assert (await http.get("/v1/models", headers=bearer("bob"))).status_code == 200
        write_keys(keys, alice={})
        await until("/v1/models", lambda r: r.status_code == 401, headers=bearer("bob"))
        assert (await http.get("/v1/models", headers=bearer("alice"))).status_code == 200
        await asyncio.to_thread(keys.write_text, "keys: [secret-thing")
        ready = await until("/health/ready", lambda r: r.json()["warnings"])
        assert (ready.status_code, "file of keys" in ready.json()["warnings"][0]) == (200, True)
        assert "secret-thing" not in ready.text + caplog.text
        assert str(keys) not in ready.text
        assert (await http.get("/v1/models", headers=bearer("alice"))).status_code == 200
        write_keys(keys, alice={})
        await until("/health/ready", lambda r: not r.json()["warnings"])


async def test_the_name_is_told_and_the_secret_is_not(
    keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app = make_app(speaking(), keys=str(keys), log_format="json", ledger=str(tmp_path / "usage.sqlite"))
    async with app.router.lifespan_context(app), client(app) as http:
        assert (
            await http.post("/v1/completions", json=completion_body(), headers=bearer("alice"))
        ).status_code == 200
        await http.get("/v1/models", headers={"authorization": "Bearer stranger"})
        metrics = (await http.get("/metrics", headers=bearer("prom"))).text
    lines = [getattr(record, "fields", {}) for record in caplog.records if record.name == "server.access"]
    assert [line["key"] for line in lines][:2] == ["alice", None]
    assert 'dsa_key_requests_total{key="alice",outcome="stop"} 1.0' in metrics
    assert 'dsa_key_tokens_total{key="alice",kind="completion"} 6.0' in metrics
    assert 'dsa_key_cost_usd_total{key="alice"}' in metrics
    everything = metrics + json.dumps(lines) + (tmp_path / "usage.sqlite").read_bytes().decode("latin-1")
    assert "alice" in everything
    assert "secret-" not in everything
    assert "stranger" not in everything


async def test_labels_of_keys_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.telemetry.metrics.callers.MAX_LABELS", 2)
    keys = write_keys(tmp_path / "keys.yaml", prom={"role": "metrics"}, **{f"k{n}": {} for n in range(5)})
    app = make_app(speaking(), keys=str(keys))
    async with app.router.lifespan_context(app), client(app) as http:
        for number in range(5):
            await http.get("/v1/models", headers=bearer(f"k{number}"))
        metrics = (await http.get("/metrics", headers=bearer("prom"))).text
    counted = [line for line in metrics.splitlines() if line.startswith("dsa_key_requests_total{")]
    assert len(counted) == 3
    assert 'dsa_key_requests_total{key="other",outcome="ok"} 3.0' in counted


async def test_stored_responses_are_their_makers(keys: Path) -> None:
    app = make_app(speaking(), keys=str(keys))
    body = {"model": "fake-model", "input": "hi"}
    async with app.router.lifespan_context(app), client(app) as http:
        made = (await http.post("/v1/responses", json=body, headers=bearer("alice"))).json()["id"]
        for method in ("GET", "DELETE"):
            other = await http.request(method, f"/v1/responses/{made}", headers=bearer("bob"))
            assert (other.status_code, code_of(other)) == (404, "response_not_found")
        follow = await http.post(
            "/v1/responses", json=body | {"previous_response_id": made}, headers=bearer("bob")
        )
        assert code_of(follow) == "previous_response_not_found"
        assert (await http.get(f"/v1/responses/{made}", headers=bearer("alice"))).status_code == 200


async def test_another_keys_prompts_are_not_found_in_the_cache(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", a={}, b={}, c={"namespace": "team"}, d={"namespace": "team"})
    engine = speaking()
    app = make_app(engine, keys=str(keys))
    async with app.router.lifespan_context(app), client(app) as http:
        for name in "abcd":
            for fields in ({}, {"cache_salt": "x"}):
                for path, body in (
                    ("/v1/completions", completion_body(n=2)),
                    ("/v1/chat/completions", chat_body()),
                ):
                    answer = await http.post(path, json=body | fields, headers=bearer(name))
                    assert answer.status_code == 200
    salts = [submit.cache_salt for submit in engine.submitted]
    assert list(dict.fromkeys(salts)) == ["a/", "a/x", "b/", "b/x", "+team/", "+team/x"]
    assert [salts.count(salt) for salt in ("a/", "a/x", "+team/", "+team/x")] == [3, 3, 6, 6]


async def test_an_idempotency_key_belongs_to_its_sender(keys: Path) -> None:
    app = make_app(speaking(), keys=str(keys), machine_price="3600")
    again = {"idempotency-key": "one"}

    async with app.router.lifespan_context(app), client(app) as http:
        for name, attempts in (("alice", 2), ("bob", 1)):
            for _ in range(attempts):
                await http.post("/v1/completions", json=completion_body(), headers=bearer(name) | again)
        assert len(app.state.services.books.retries._requests) == 2
