"""Agents and user interfaces get an answer to their typical bodies from the default model, whatever they send beside it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.bodies import BODIES, MESSAGES, RESPONSES
from tests.e2e.serving import MODEL, Server

LIMITS = {RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}


def short(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body with a limit of its own kind lowered, so that the test is quick."""
    names = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    given = next((name for name in names if name in body), LIMITS.get(path, "max_tokens"))
    return {"model": MODEL} | body | {given: 4}


@pytest.mark.parametrize("name", BODIES)
def test_a_typical_body_is_answered(server: Server, name: str) -> None:
    path, body = BODIES[name]
    reply = httpx.post(server.url + path, json=short(path, body), timeout=100)
    assert reply.status_code == 200, reply.text
    if body.get("stream"):
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert '"error":{' not in reply.text
        assert any(
            end in reply.text
            for end in ("[DONE]", "response.completed", "response.incomplete", "message_stop")
        )
