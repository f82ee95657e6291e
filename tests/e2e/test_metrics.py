"""/metrics and the usage in answers agree, and the prefix cache makes the first token faster."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.text.tokenizer import Tokenizer
from tests.e2e.serving import MODEL, Server, until


def time_to_first_token(server: Server, prompt: list[int]) -> tuple[float, Any]:
    with server.sdk() as sdk:
        start = time.monotonic()
        stream = sdk.completions.create(
            model=MODEL, prompt=prompt, max_tokens=2, temperature=0,
            stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        next(stream)
        seconds = time.monotonic() - start
        *_, last = stream
    return seconds, last.usage


@pytest.mark.alone
def test_a_prompt_that_was_seen_before_is_read_faster(server: Server) -> None:
    prompt = [3000 + time.time_ns() % 10000, *range(1000, 1800)]
    cold, first = time_to_first_token(server, prompt)
    warm, second = time_to_first_token(server, prompt)
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == 801 // 64 * 64
    assert warm < cold / 2
    _, other = time_to_first_token(server, [1, *prompt])  # another first token: no prefix is equal
    assert other.prompt_tokens_details.cached_tokens == 0


def test_every_sample_is_well_formed(server: Server) -> None:
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    for name, family in families.items():
        assert name.startswith(("dsa_", "vllm:"))
        assert family.documentation
        assert family.samples or name in ("dsa_requests", "dsa_context_cost_usd", "dsa_context_tokens")
    assert server.metrics()["dsa_engine_up"] == 1


def test_an_answer_that_loops_is_counted(server: Server) -> None:
    before = server.metrics()["dsa_token_loops_total"]
    with server.sdk() as sdk:
        looping = sdk.completions.create(
            model=MODEL,
            prompt="and so on and so on " * 8,
            max_tokens=120,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        sdk.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=100, temperature=1, seed=1)
    assert looping.choices[0].text.count("and so on") > 20
    assert server.metrics()["dsa_token_loops_total"] == before + 1


def test_counters_add_up_with_the_usages(server: Server, tokenizer: Tokenizer) -> None:
    until(lambda: server.metrics()["dsa_requests_running"] == 0)
    before = server.metrics()
    long = tokenizer.encode(f"{time.time_ns()}: " + "The tide came in and the tide went out. " * 12)
    usages: list[dict[str, Any]] = []
    outcomes: Counter[tuple[str, str]] = Counter()
    completions, chat = "/v1/completions", "/v1/chat/completions"
    for path, outcome, fields in (
        (completions, "length", {"prompt": long, "max_tokens": 5, "ignore_eos": True}),
        (completions, "length", {"prompt": long, "max_tokens": 3, "ignore_eos": True}),
        (completions, "length", {"prompt": ["a b", "c d"], "n": 2, "max_tokens": 4, "ignore_eos": True}),
        (chat, "stop", {"messages": [{"role": "user", "content": "What is the capital of France?"}]}),
    ):
        response = server.post(path, **({"temperature": 0, "max_tokens": 40} | fields))
        usages.append(response.json()["usage"])
        outcomes[path, outcome] += 1
    assert server.post(chat, messages=[]).status_code == 400
    outcomes[chat, "client_error"] += 1
    until(lambda: server.metrics()["dsa_requests_running"] == 0)
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    for (path, outcome), count in outcomes.items():
        assert grown(f'dsa_requests_total{{endpoint="{path}",outcome="{outcome}"}}') == count
    # The second choices of the third request read its prompts again; the usage counts a prompt once.
    prompt = sum(usage["prompt_tokens"] for usage in usages) + usages[2]["prompt_tokens"]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    completion = sum(usage["completion_tokens"] for usage in usages)
    choices, requests = 7, 4
    assert cached >= 64
    assert grown('dsa_tokens_total{kind="prompt_cached"}') == cached
    assert grown('dsa_tokens_total{kind="prompt_computed"}') == prompt - cached
    assert grown('dsa_tokens_total{kind="completion"}') == completion
    assert grown("dsa_engine_prefill_tokens_total") == prompt - cached
    assert grown("dsa_engine_decode_tokens_total") == completion - choices  # the last token is never computed
    assert grown("dsa_prefix_cache_queries_tokens_total") == prompt
    assert grown("dsa_prefix_cache_hits_tokens_total") == cached
    assert grown("dsa_time_to_first_token_seconds_count") == requests
    assert grown("dsa_e2e_request_latency_seconds_count") == requests
    assert grown("dsa_time_per_output_token_seconds_count") == choices
    assert grown("dsa_request_queue_seconds_count") == choices
    assert grown("dsa_e2e_request_latency_seconds_sum") >= grown("dsa_time_to_first_token_seconds_sum") > 0
    pages = [after[f'dsa_kv_pages{{state="{state}"}}'] for state in ("used", "cached", "free")]
    assert pages[0] == 0
    assert pages[1] > 0
    (info,) = (name for name in after if name.startswith("dsa_model_info"))
    assert f'num_gpu_blocks="{int(sum(pages))}"' in info


@pytest.mark.slow
def test_the_canary_of_an_idle_server_agrees_with_itself() -> None:
    server = Server("--canary-interval", "0.5")
    try:
        server.wait_ready()
        until(lambda: server.metrics()['dsa_canary_runs_total{outcome="agree"}'] >= 2)
        assert server.metrics()['dsa_canary_runs_total{outcome="disagree"}'] == 0
        assert server.metrics()["dsa_prefix_cache_hits_tokens_total"] >= 2 * 128
        assert server.metrics()['dsa_tokens_total{kind="completion"}'] == 0
        assert server.get("/health/ready").json()["warnings"] == []
    finally:
        server.close()
