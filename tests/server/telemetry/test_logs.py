"""Logs as a collector reads them: one JSON object a line, an access line a request, and no prompts."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from server.settings import SettingsError, load_settings
from server.telemetry.logs import configure
from tests.server.kit import chat_body, client, completion_body, make_app, speaking

CANARY = "xylophone-heliotrope"


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure("json")
    yield stream
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def access(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines(stream) if line["logger"] == "server.access"]


async def test_one_access_line_a_request(stderr: io.StringIO) -> None:
    async with client(make_app(speaking("hello", cached=1), log_format="json")) as http:
        headers = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
        whole = await http.post("/v1/chat/completions", json=chat_body(n=2), headers=headers)
        await http.post("/v1/completions", json=completion_body(max_tokens=2, stream=True))
        await http.post("/v1/chat/completions", json={})
        await http.get("/a/path/of/the%0Aclients/own")
        await http.get("/health/ready")
        await http.get("/metrics")
    chat, text, bad, lost = access(stderr)
    assert chat["request_id"] == whole.headers["x-request-id"]
    assert chat["trace_id"] == "ab" * 16
    usage = whole.json()["usage"]
    expected = {
        "level": "info", "method": "POST", "endpoint": "/v1/chat/completions", "status": 200, "outcome": "stop",
        "model": "fake-model", "stream": False, "choices": 2, "finish_reasons": ["stop", "stop"],
        "prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"],
        "cached_tokens": 1, "queue_seconds": 0.001,
    }  # fmt: skip
    assert {name: chat[name] for name in expected} == expected
    assert 0 < chat["time_to_first_token_seconds"] <= chat["duration_seconds"]
    assert (text["stream"], text["finish_reasons"], text["completion_tokens"]) == (True, ["length"], 2)
    assert (bad["status"], bad["outcome"]) == (400, "client_error")
    assert "model" not in bad
    assert (lost["status"], lost["endpoint"]) == (404, "other")
    assert "clients" not in stderr.getvalue()


@pytest.mark.parametrize("fault", [None, "die", "error"])
async def test_prompts_are_in_no_line(stderr: io.StringIO, fault: str | None) -> None:
    engine = speaking("hello", **({} if fault is None else {"fault": fault, "fault_after": 2}))
    async with client(make_app(engine, log_format="json")) as http:
        await http.post("/v1/chat/completions", json=chat_body(CANARY))
        await http.post("/v1/completions", json=completion_body(CANARY, stream=True))
        await http.post("/v1/chat/completions", json=chat_body(CANARY, temperature=CANARY))
        await http.post("/v1/chat/completions", content=f'{{"messages": {CANARY}')
    assert len(access(stderr)) == 4
    assert CANARY not in stderr.getvalue()
    if fault is not None:
        first = next(line for line in lines(stderr) if line["logger"] == "server.requests")
        assert access(stderr)[0]["request_id"] in first["message"]
        assert access(stderr)[0]["completion_tokens"] == 2


async def test_prompts_where_they_were_asked_for(stderr: io.StringIO) -> None:
    async with client(make_app(speaking(), log_format="json", log_prompts=True)) as http:
        await http.post("/v1/completions", json=completion_body([CANARY, "other"], n=2))
    (line,) = access(stderr)
    assert line["prompts"] == [CANARY, "other"]


async def test_text_has_no_access_lines(stderr: io.StringIO) -> None:
    async with client(make_app(speaking())) as http:
        await http.post("/v1/completions", json=completion_body())
    assert access(stderr) == []


def test_an_exception_is_one_line(stderr: io.StringIO) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("x").exception("it %s", "broke")
    (line,) = lines(stderr)
    assert (line["message"], line["level"]) == ("it broke", "error")
    assert line["exception"].startswith("Traceback")
    assert line["time"].endswith("+00:00")


def test_prompts_need_a_log_to_go_to() -> None:
    with pytest.raises(SettingsError, match="--log-prompts needs --log-format json"):
        load_settings({"log_prompts": True}, {})
