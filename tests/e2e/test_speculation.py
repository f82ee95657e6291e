"""A server with drafts gives the same answers as one without, in fewer steps, and reports the accepted drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.serving import Server

LIST: list[Any] = [
    {
        "role": "user",
        "content": "Repeat this sentence exactly, five times: The quick brown fox jumps over the lazy dog.",
    }
]


def answer(server: Server, **body: Any) -> Any:
    response = server.post("/v1/chat/completions", messages=LIST, max_tokens=50, **body)
    assert response.status_code == 200
    return response.json()["choices"][0]["message"]["content"], response.json()["usage"]["completion_tokens"]


def test_drafting_changes_the_steps_and_not_the_text(
    small_server: Server, start: Callable[..., Server]
) -> None:
    drafting = start(
        *("--drafter", "ngram", "--speculative-tokens", "5", "--dtype", "float32", "--max-model-len", "512"),
        *("--kv-cache-memory", "34MiB", "--token-budget", "64", "--max-running", "16", "--threads", "1"),
    ).wait_ready()
    tokens = 0
    for body in ({"temperature": 0}, {"temperature": 0.7, "seed": 11}):
        text, count = answer(drafting, **body)
        assert (text, count) == answer(small_server, **body)
        tokens += count
    metrics = drafting.metrics()
    accepted = metrics["dsa_spec_decode_accepted_tokens_total"]
    assert 0 < accepted < metrics["dsa_spec_decode_draft_tokens_total"]
    assert metrics["dsa_spec_decode_accepted_length_sum"] == accepted
    # Each request has two or three steps of prompt, the last of which gives its first token.
    assert metrics["dsa_engine_steps_total"] <= tokens - accepted + 9
    assert small_server.metrics()["dsa_spec_decode_draft_tokens_total"] == 0
