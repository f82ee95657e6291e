"""Forgiving paths and methods, and pages of other origins."""

from __future__ import annotations

import httpx
import pytest

from server.http.paths import canonical
from tests.server.kit import chat_body, client, make_app, serving, speaking


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/v1/models/", "/v1/models"),
        ("/models", "/v1/models"),
        ("/models/org/name", "/v1/models/org/name"),
        ("/modelsx", "/modelsx"),
        ("/chat/completions/", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/health", "/health"),
        ("/v1/nowhere", "/v1/nowhere"),
    ],
)
def test_canonical(path: str, meant: str) -> None:
    assert canonical(path) == meant
    assert canonical(meant) == meant


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/v1/v1/chat/completions/"])
async def test_a_client_may_have_either_base_url(path: str) -> None:
    async with client(make_app(speaking())) as http:
        assert (await http.post(path, json=chat_body())).status_code == 200
        metrics = (await http.get("/metrics")).text
    assert 'dsa_requests_total{endpoint="/v1/chat/completions",outcome="stop"} 1.0' in metrics


async def test_head_is_get_without_a_body() -> None:
    async with serving(make_app(speaking())) as url, httpx.AsyncClient(base_url=url) as http:
        for path in ("/v1/models", "/health", "/health/live", "/metrics", "/version", "/openapi.json"):
            got, head = await http.get(path), await http.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"] == got.headers["content-type"]
            assert (await http.get(path)).status_code == 200  # the connection is still in order
        assert (await http.head("/v1/chat/completions")).status_code == 405


async def test_pages_of_other_origins() -> None:
    asked = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    origin = {"origin": "https://page.example"}
    async with client(make_app(speaking(), allow_origins="*")) as http:
        response = await http.options("/v1/chat/completions", headers=asked)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "*")
        assert "authorization" in response.headers["access-control-allow-headers"]
        response = await http.post("/v1/chat/completions", json=chat_body(stream=True), headers=origin)
        assert response.headers["access-control-allow-origin"] == "*"
        assert response.text.endswith("data: [DONE]\n\n")
    async with client(make_app(speaking(), allow_origins="https://page.example, https://b.example")) as http:
        response = await http.get("/v1/models", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://page.example"
        response = await http.get("/v1/models", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in response.headers
    async with client(make_app(speaking())) as http:
        assert (await http.options("/v1/chat/completions", headers=asked)).status_code == 405
