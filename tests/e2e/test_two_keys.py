"""Two keys on a real server: neither sees, times or pays for the other, also when the server is killed in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.e2e.serving import MODEL, Server
from tests.ledger import ledger_rows
from tests.server.access.kit import bearer, write_keys

PRICES = """
version: "test"
currency: USD
machine_hour: "1"
prices:
- model: "*"
  valid_from: 2025-01-01T00:00:00Z
  tokens: {prompt_cached: "1", prompt_uncached: "10", completion: "100"}
"""
BUDGET = 10**7  # nano-dollars: a request of 10 tokens of output costs about a tenth


def ask(server: Server, name: str, prompt: str, max_tokens: int) -> tuple[httpx.Response, float]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    begun = time.monotonic()
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer(name), timeout=100)
    return answer, time.monotonic() - begun


def stream(server: Server, began: threading.Event) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 40, "ignore_eos": True, "stream": True}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=bearer("alice"), timeout=100) as answer:
        for _ in answer.iter_lines():
            began.set()


def ask_the_dying(server: Server, began: threading.Event) -> None:
    """Ask for a stream, say when it has begun, and see it break off."""
    with pytest.raises(httpx.HTTPError):
        stream(server, began)


def booked(ledger: Path, name: str) -> int:
    return sum(row["amount_nanos"] for row in ledger_rows(ledger) if row["key"] == name)


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    keys = write_keys(
        tmp_path / "keys.yaml",
        alice={"budget": {"usd": f"0.{BUDGET:09d}"}}, bob={}, carol={}, prom={"role": "metrics"},
    )  # fmt: skip
    (tmp_path / "prices.yaml").write_text(PRICES)
    return (
        *("--keys", str(keys), "--prices", str(tmp_path / "prices.yaml")),
        *(
            "--ledger",
            str(tmp_path / "usage.sqlite"),
            "--max-model-len",
            "2048",
            "--kv-cache-memory",
            "256MiB",
        ),
    )


@pytest.mark.timeout(400)
def test_another_keys_prompt_is_neither_seen_nor_timed(
    start: Callable[..., Server], flags: tuple[str, ...]
) -> None:
    server = start(*flags).wait_ready()
    assert server.get("/v1/models").status_code == 401
    prompt = "The owner of this text is known to one key only. " * 130
    seconds, cached = [], []
    for name in ("bob", "bob", "bob", "carol"):
        answer, took = ask(server, name, prompt, 1)
        seconds.append(took)
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0
    assert min(cached[1:3]) > 1000  # a key finds its own
    assert cached[3] == 0
    assert seconds[3] > 3 * min(seconds[1:3])


@pytest.mark.timeout(400)
def test_budgets_outlive_a_server_that_is_killed(
    start: Callable[..., Server], flags: tuple[str, ...], tmp_path: Path
) -> None:
    ledger, paid = tmp_path / "usage.sqlite", 0
    for last in (False, True):
        server = start(*flags).wait_ready()
        before = booked(ledger, "alice")
        codes: list[int] = []
        while len(codes) < 30 and (last or len(codes) < 4):
            answer, _ = ask(server, "alice", f"Tale {len(codes)}: once", 10)
            codes.append(answer.status_code)
            if answer.status_code != 200:
                break
            paid += answer.json()["usage"]["cost_details"]["amount"]
        if not last:
            assert codes == [200] * 4
            began = threading.Event()
            running = threading.Thread(target=ask_the_dying, args=(server, began))
            running.start()
            assert began.wait(60)
            server.process.kill()
            server.process.wait()
            running.join()
    assert codes[-1] == 402
    assert ask(server, "bob", "Tale", 10)[0].status_code == 200
    spent = booked(ledger, "alice")
    # What a client saw is booked. The server that was killed may have booked one more, which nobody saw the end of.
    assert paid <= spent <= BUDGET
    assert BUDGET - spent < 10 * 100_000 + 20 * 10_000  # the next one did not fit
    metrics = httpx.get(f"{server.url}/metrics", headers=bearer("prom"), timeout=30).text
    (counted,) = (
        float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith('dsa_key_cost_usd_total{key="alice"}')
    )
    assert round(counted * 10**9) == spent - before
