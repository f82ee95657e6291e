"""A real Prometheus scrapes a real server: every panel of the dashboard and every recording rule has data."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.kit import DEPLOY, tool
from tests.deploy.test_monitoring import generator, rules
from tests.e2e.serving import MODEL, Server, until

ALIASES = {
    "vllm:num_requests_waiting": {"model_name", "engine"},
    "vllm:num_requests_running": {"model_name", "engine"},
    "vllm:kv_cache_usage_perc": {"model_name", "engine"},
    "vllm:cache_config_info": {"model_name", "engine", "block_size", "num_gpu_blocks"},
}
"""The gauges that the Gateway API inference extension reads by default, with their labels."""


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[str]:
    """Run Prometheus with the shipped configuration, except target and scrape interval; yields its address."""
    program = tool("prometheus", "prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
             f"--web.listen-address={address}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def query(prometheus: str, expr: str) -> list[Any]:
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expr}, timeout=10).json()
    assert answer["status"] == "success", (expr, answer)
    result: list[Any] = answer["data"]["result"]
    return result


def scraped(prometheus: str) -> bool:
    try:
        return any(item["value"][1] == "1" for item in query(prometheus, "up"))
    except (httpx.TransportError, ValueError):
        return False


def test_the_scrape_passes_promtool(server: Server) -> None:
    run = subprocess.run(
        [tool("promtool", "prometheus"), "check", "metrics"],
        input=server.get("/metrics").text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # The extension chose these names. By convention only recording rules have colons.
    lint = {f"{name} metric names should not contain ':'" for name in ALIASES}
    assert (set(run.stderr.splitlines()), run.stdout) == (lint, "")
    assert run.returncode == 3  # there is lint, and nothing worse


def test_what_kubernetes_scales_and_routes_by_is_there(server: Server) -> None:
    text = "".join(path.read_text("utf-8") for path in (DEPLOY / "kubernetes").rglob("*.yaml"))
    names = set(re.findall(r"\bdsa_\w+", text))
    exposed = {name.partition("{")[0] for name in server.metrics()}
    assert names
    assert names <= exposed


def test_the_inference_extension_needs_no_configuration(server: Server) -> None:
    """See `ALIASES`; https://github.com/kubernetes-sigs/gateway-api-inference-extension, model server protocol."""
    assert server.post("/v1/completions", prompt="The tide", max_tokens=2).status_code == 200
    families = {
        family.name: family
        for family in text_string_to_metric_families(server.get("/metrics").text)
        if family.name.startswith("vllm:")
    }
    assert families.keys() == ALIASES.keys()
    for name, labels in ALIASES.items():
        (sample,) = families[name].samples
        assert (families[name].type, set(sample.labels)) == ("gauge", labels)
        assert sample.labels["model_name"] == MODEL
    values = server.metrics()
    (cache,) = families["vllm:cache_config_info"].samples
    pages = sum(values[f'dsa_kv_pages{{state="{state}"}}'] for state in ("used", "cached", "free"))
    assert (cache.value, int(cache.labels["num_gpu_blocks"])) == (1, pages)
    assert int(cache.labels["block_size"]) > 0
    assert 0 <= families["vllm:kv_cache_usage_perc"].samples[0].value <= 1
    pool = (DEPLOY / "kubernetes" / "examples" / "inference-pool" / "pool.yaml").read_text("utf-8")
    assert "dsa_" not in pool


def test_every_panel_and_every_recording_has_data(server: Server, prometheus: str) -> None:
    until(lambda: scraped(prometheus))
    for length in (3, 5, 4):  # rates need samples before, between and after
        assert server.post("/v1/completions", prompt="The tide", max_tokens=length).status_code == 200
        time.sleep(1.2)
    wanted = {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        .replace("$__rate_interval", "30s")
        .replace("$job", "dsa-serve")
        for panel in generator().dashboard()["panels"]
        for target in panel["targets"]
    } | {rule["record"]: rule["record"] for rule in rules() if "record" in rule}

    def empty() -> list[str]:
        return [
            name
            for name, expr in wanted.items()
            if not any(item["value"][1] != "NaN" for item in query(prometheus, expr))
        ]

    deadline = time.monotonic() + 10
    while (missing := empty()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert missing == []
    assert query(prometheus, 'ALERTS{alertstate="firing"}') == []
