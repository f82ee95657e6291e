"""What is measured, read back with Prometheus's own parser."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from engine.client import EngineState, EngineStatus
from engine.protocol import EngineStats, add_counters
from server.telemetry.metrics import Metrics
from server.telemetry.metrics.engine import ENGINE_COUNTERS
from tests.server.fake_engine import FakeEngine
from tests.server.kit import chat_body, client, completion_body, make_app, speaking

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


async def scrape(http: Any) -> Samples:
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(response.text)


async def test_the_exposition() -> None:
    engine = speaking("hello", cached=1)
    engine.set_stats(
        running=2, waiting=3, pages_used=4, pages_cached=2, pages_free=2, preemptions_total=5, steps_total=9
    )
    async with client(make_app(engine)) as http:
        await http.post("/v1/chat/completions", json=chat_body(n=2))
        await http.post("/v1/chat/completions", json=chat_body(max_tokens=2, stream=True))
        await http.post("/v1/chat/completions", json={})
        await http.post("/v1/completions", json=completion_body(stop="l"))
        await http.get("/v1/models/nothing")
        await http.get("/a/path/of/the/clients/own")
        samples = await scrape(http)
    chat = {"endpoint": "/v1/chat/completions"}
    assert value(samples, "dsa_requests_total", **chat, outcome="stop") == 1
    assert value(samples, "dsa_requests_total", **chat, outcome="length") == 1
    assert value(samples, "dsa_requests_total", **chat, outcome="client_error") == 1
    assert value(samples, "dsa_requests_total", endpoint="/v1/completions", outcome="stop") == 1
    assert value(samples, "dsa_requests_total", endpoint="other", outcome="client_error") == 1
    assert (
        value(samples, "dsa_requests_total", endpoint="/v1/models/{model_id:path}", outcome="client_error")
        == 1
    )
    assert value(samples, "dsa_tokens_total", kind="prompt_cached") == 4
    assert value(samples, "dsa_tokens_total", kind="prompt_computed") == 3 * 3 + 2
    assert value(samples, "dsa_tokens_total", kind="completion") == 6 + 6 + 2 + 3
    for name, count in (
        ("dsa_time_to_first_token_seconds", 3),
        ("dsa_e2e_request_latency_seconds", 3),
        ("dsa_time_per_output_token_seconds", 4),
        ("dsa_request_queue_seconds", 4),
    ):
        assert value(samples, f"{name}_count") == count, name
        bounds = [float(dict(labels)["le"]) for own, labels in samples if own == f"{name}_bucket"]
        assert min(bounds) < 0.001
        assert sorted(bounds)[-2] >= (60 if "token_seconds" in name and "per" in name else 3600)
    assert value(samples, "dsa_requests_running") == 2
    assert value(samples, "dsa_requests_waiting") == 3
    assert value(samples, "dsa_kv_cache_usage_ratio") == 0.5
    assert value(samples, "dsa_kv_pages", state="cached") == 2
    assert value(samples, "dsa_preemptions_total") == 5
    assert value(samples, "dsa_engine_steps_total") == 9
    assert value(samples, "dsa_engine_up") == 1
    assert value(samples, "dsa_engine_restarts_total") == 0
    (info,) = [dict(labels) for name, labels in samples if name == "dsa_model_info"]
    assert info["model"] == "fake-model"
    assert info["block_size"] == "64"
    assert info["indexer"] == "fake.safetensors"


async def test_open_metrics_where_asked_for() -> None:
    async with client(make_app(speaking())) as http:
        response = await http.get(
            "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"}
        )
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


async def test_before_the_engine_is_ready() -> None:
    async with client(make_app(FakeEngine(ready=False))) as http:
        samples = await scrape(http)
    assert value(samples, "dsa_engine_up") == 0
    assert value(samples, "dsa_kv_cache_usage_ratio") == 0
    assert value(samples, "dsa_model_info", model="fake-model") == 1


async def test_prompts_of_failed_requests_count_once_they_were_computed() -> None:
    async with client(make_app(speaking("hello", fault="die", fault_after=2))) as http:
        await http.post("/v1/chat/completions", json=chat_body())
        samples = await scrape(http)
    assert value(samples, "dsa_tokens_total", kind="prompt_computed") == 4
    assert value(samples, "dsa_tokens_total", kind="completion") == 2
    assert value(samples, "dsa_e2e_request_latency_seconds_count") == 0
    chat = {"endpoint": "/v1/chat/completions"}
    assert value(samples, "dsa_requests_total", **chat, outcome="unavailable") == 1


async def test_a_dead_engine_holds_nothing() -> None:
    engine = speaking()
    async with client(make_app(engine)) as http:
        engine.set_stats(running=2, waiting=1, pages_used=3, pages_free=1, steps_total=7)
        assert value(await scrape(http), "dsa_requests_running") == 2
        engine.set_status(
            state=EngineState.DOWN, restarts=1, pid=2, stats=EngineStats(), ended=EngineStats(steps_total=7)
        )
        samples = await scrape(http)
        assert value(samples, "dsa_requests_running") == 0
        assert value(samples, "dsa_requests_waiting") == 0
        assert value(samples, "dsa_kv_cache_usage_ratio") == 0
        assert value(samples, "dsa_engine_steps_total") == 7
        engine.set_status(state=EngineState.READY)
        engine.set_stats(running=1, steps_total=1)
        samples = await scrape(http)
    assert value(samples, "dsa_requests_running") == 1
    assert value(samples, "dsa_engine_steps_total") == 8


def test_apps_share_nothing() -> None:
    one, other = (Metrics(name, lambda: EngineStatus(state=EngineState.READY)) for name in ("a", "b"))
    one.request_ended("/x", "ok")
    assert b"/x" in one.expose("")[0]
    assert b"/x" not in other.expose("")[0]


def test_every_engine_counter_is_exposed() -> None:
    totals = {name for name in EngineStats.__struct_fields__ if name.endswith("_total")}
    in_the_histogram = {"batch_requests_total", "batch_size_counts_total", "draft_lengths_total"}
    by_kind = {"invalid_selections_total"}
    assert {name for name, _, _ in ENGINE_COUNTERS} | in_the_histogram | by_kind == totals


def test_invalid_selections_are_counted_by_kind() -> None:
    stats = EngineStats(invalid_selections_total=(1, 0, 2, 0))
    metrics = Metrics("a", lambda: EngineStatus(state=EngineState.READY, stats=stats))
    text = metrics.expose("")[0].decode()
    for kind, count in (("empty", 1), ("short", 0), ("outside", 2), ("repeated", 0)):
        assert f'dsa_invalid_selections_total{{kind="{kind}"}} {count}.0' in text


def test_counters_of_engines_that_are_gone_are_kept() -> None:
    one = EngineStats(running=3, steps_total=2, busy_seconds_total=0.5, batch_size_counts_total=(1, 1))
    both = add_counters(
        one, EngineStats(steps_total=5, busy_seconds_total=0.25, batch_size_counts_total=(0, 5))
    )
    assert both == EngineStats(steps_total=7, busy_seconds_total=0.75, batch_size_counts_total=(1, 6))
    assert add_counters(both, EngineStats()) == both


async def test_drafts_are_counted_and_their_accepted_lengths_are_a_histogram() -> None:
    engine = speaking("hello")
    engine.set_stats(draft_tokens_total=40, draft_lengths_total=(5, 2, 3))
    async with client(make_app(engine)) as http:
        samples = await scrape(http)
    assert value(samples, "dsa_spec_decode_draft_tokens_total") == 40
    assert value(samples, "dsa_spec_decode_accepted_tokens_total") == 8
    name = "dsa_spec_decode_accepted_length"
    buckets = {le: value(samples, f"{name}_bucket", le=le) for le in ("0.0", "1.0", "2.0", "+Inf")}
    assert buckets == {"0.0": 5, "1.0": 7, "2.0": 10, "+Inf": 10}
    assert (value(samples, f"{name}_count"), value(samples, f"{name}_sum")) == (10, 8)
