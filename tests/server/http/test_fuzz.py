"""No input whatsoever makes the server fail: below 500, in OpenAI's shape, every time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server.http.protocol.chat import ChatCompletionBody
from server.http.protocol.completions import CompletionBody
from tests.server.kit import chat_body, client, completion_body, make_app, speaking

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
