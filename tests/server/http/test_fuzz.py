"""No input whatsoever makes the server fail: below 500, in OpenAI's shape, every time; with a key, and without."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server.http.access import PROBES
from server.http.protocol.admin import SettingsBody
from server.http.protocol.chat import ChatCompletionBody
from server.http.protocol.completions import CompletionBody
from server.http.routes import ROUTERS
from tests.server.access.kit import bearer, write_keys
from tests.server.kit import MODEL, chat_body, client, completion_body, make_app, speaking

INTEGERS = st.integers() | st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64])
LEAVES = st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
NEAR = st.one_of(
    JSON,
    st.sampled_from(
        ["dense", "text", "auto", {"type": "text"}, {"top_k": 5}, {"include_usage": True}, ["a"]]
    ),
    st.dictionaries(st.integers(-5, 400).map(str), st.floats(-150, 150), max_size=3),
    st.lists(st.integers(-5, 400), max_size=5),
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "tool", "x"]), "content": JSON}), max_size=3
    ),
)


def fields(model: Any) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(sorted(model.model_fields)) | st.text(max_size=10)
    return st.dictionaries(names, NEAR, max_size=4)


def check(path: str, content: bytes) -> None:
    async def post() -> None:
        app = make_app(speaking("hi"))
        async with app.router.lifespan_context(app), client(app) as http:
            response = await http.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code in (200, 400, 404, 413), response.text
            if response.status_code != 200:
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert isinstance(error["message"], str)
            assert app.state.lifecycle.active_requests == app.state.services.admission.admitted == 0

    asyncio.run(post())


RELAXED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.process  # the compiler of grammars
@RELAXED
@given(fields(ChatCompletionBody))
def test_chat_fields(extra: dict[str, Any]) -> None:
    check("/v1/chat/completions", json.dumps(chat_body() | extra).encode())


@pytest.mark.process  # the compiler of grammars
@RELAXED
@given(fields(CompletionBody))
def test_completion_fields(extra: dict[str, Any]) -> None:
    check("/v1/completions", json.dumps(completion_body() | extra).encode())


@RELAXED
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"a":' * 20_000)
@example(b'{"model":"fake-model","prompt":"\\udfff"}')
@example(b'{"model":"fake-model","prompt":"x","temperature":-NaN}')
def test_any_bytes(raw: bytes) -> None:
    check("/v1/completions", raw)


ROUTES = sorted(
    (method, path.replace("{response_id}", "resp_x").replace("{model_id:path}", MODEL))
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute) and (path := route.path)
    for method in route.methods or ()
)
ADMIN_FIELDS = st.dictionaries(
    st.sampled_from(sorted(SettingsBody.model_fields)) | st.text(max_size=10), NEAR, max_size=4
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("keys")
    roles: dict[str, dict[str, Any]] = {"user": {}, "root": {"role": "admin"}, "prom": {"role": "metrics"}}
    return str(write_keys(folder / "keys.yaml", **roles))


def send(keys: str, method: str, path: str, headers: dict[str, str], content: bytes) -> httpx.Response:
    async def ask() -> httpx.Response:
        app = make_app(speaking("hi"), keys=keys)
        async with app.router.lifespan_context(app), client(app) as http:
            more = {"content-type": "application/json"} | headers
            return await http.request(method, path, content=content, headers=more)

    return asyncio.run(ask())


@RELAXED
@given(
    st.sampled_from(ROUTES)
    | st.tuples(st.sampled_from(["GET", "POST", "PUT", "PATCH"]), st.just("/nothing")),
    st.sampled_from(["authorization", "x-api-key", "Authorization"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
    | st.sampled_from(
        ["Bearer", "Bearer ", "bearer secret-use", "Basic secret-user", "Bearer secret-user,secret-root"]
    ),
    JSON,
)
def test_no_route_is_open_without_a_key(
    keys: str, route: tuple[str, str], header: str, value: str, body: Any
) -> None:
    method, path = route
    response = send(keys, method, path, {header: value}, json.dumps(body).encode())
    assert response.status_code == (200 if path in PROBES else 401), response.text


@RELAXED
@given(st.sampled_from(ROUTES), st.sampled_from(["user", "root", "prom"]), JSON)
def test_no_route_fails_for_any_role(keys: str, route: tuple[str, str], name: str, body: Any) -> None:
    method, path = route
    response = send(keys, method, path, bearer(name), json.dumps(body).encode())
    assert response.status_code < 500, response.text
    role = "admin" if path.startswith("/admin") else "metrics" if path == "/metrics" else "user"
    opened = {"user": ("user",), "root": ("admin", "metrics"), "prom": ("metrics",)}[name]
    if path not in PROBES:
        assert (response.status_code == 403) == (role not in opened), response.text


@RELAXED
@given(ADMIN_FIELDS)
def test_settings_take_what_is_valid_and_nothing_else(keys: str, fields: dict[str, Any]) -> None:
    level = logging.getLogger().level
    try:
        response = send(keys, "PATCH", "/admin/settings", bearer("root"), json.dumps(fields).encode())
    finally:
        logging.getLogger().setLevel(level)
    assert response.status_code in (200, 400), response.text
    assert response.status_code == 400 or set(fields) <= set(SettingsBody.model_fields)
