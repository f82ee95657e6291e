"""Clients that hang up: their pages are free within a step or two, and other requests are not affected."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

import pytest

from tests.e2e.serving import MODEL, Server, until

USED = 'dsa_kv_pages{state="used"}'


def send(server: Server, body: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({"model": MODEL} | body),
        {"content-type": "application/json"},
    )
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_hanging_up_frees_the_pages_at_once(small_server: Server, phase: str, stream: bool) -> None:
    prompt = [1000 + time.time_ns() % 1000, *range(2000, 2400)]  # unique, so that no prefix is cached
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 100, "stream": stream, "ignore_eos": True}
    if phase == "decode":
        body |= {"prompt": "Once upon a time", "max_tokens": 500}
    before = small_server.metrics()
    assert before["dsa_requests_running"] == before[USED] == 0

    def progress(name: str) -> float:
        return small_server.metrics()[name] - before[name]

    connection = send(small_server, body)
    if phase == "decode":
        until(lambda: progress("dsa_engine_decode_tokens_total") >= 3)
    else:
        until(lambda: progress("dsa_engine_prefill_tokens_total") >= 64)
        assert progress("dsa_engine_prefill_tokens_total") < len(prompt)
    assert small_server.metrics()[USED] > 0
    connection.close()
    at_hang_up = small_server.metrics()["dsa_engine_steps_total"]
    until(lambda: small_server.metrics()[USED] == 0, 10)
    after = small_server.metrics()
    assert after["dsa_requests_running"] == after["dsa_requests_waiting"] == 0
    assert after["dsa_engine_steps_total"] - at_hang_up <= 2
    disconnected = 'dsa_requests_total{endpoint="/v1/completions",outcome="disconnected"}'
    assert after[disconnected] - before.get(disconnected, 0) == 1
    assert small_server.post("/v1/completions", prompt="Still here?", max_tokens=2).status_code == 200


def test_one_of_two_hangs_up(small_server: Server) -> None:
    body: dict[str, Any] = {"prompt": "It was a dark night", "temperature": 1, "seed": 3, "max_tokens": 16}
    alone = small_server.post("/v1/completions", **body).json()["choices"][0]["text"]
    staying = send(small_server, body)
    leaving = send(small_server, {"prompt": "It was a bright day", "max_tokens": 500, "stream": True})
    until(lambda: small_server.metrics()["dsa_requests_running"] == 2)
    leaving.close()
    answer = json.loads(staying.getresponse().read())
    staying.close()
    assert answer["choices"][0]["text"] == alone
    until(lambda: small_server.metrics()[USED] == 0)
