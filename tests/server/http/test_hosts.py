"""Names that a server is called by."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from server.http.hosts import allowed_hosts, name_of
from tests.server.access.kit import write_keys
from tests.server.kit import client, error_of, make_app, speaking


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Example.com:8000", "example.com"),
        ("example.com.", "example.com"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("a:b", "a:b"),
        ("", ""),
    ],
)
def test_a_name_is_read(header: str, name: str) -> None:
    assert name_of(header) == name


@pytest.mark.parametrize(
    ("allowed", "host", "guarded", "good", "bad"),
    [
        ("auto", "127.0.0.1", False, ["localhost", "a.localhost", "127.0.0.1", "::1", "10.0.0.1", socket.gethostname().lower()],
         ["evil.example", "", "localhost.evil.example", "127.0.0.1.evil.example"]),
        ("api.example.com, *.local", "0.0.0.0", True, ["api.example.com", "x.local"],
         ["example.com", "xapi.example.com", "local", "127.0.0.1", ""]),
    ],
)  # fmt: skip
def test_what_is_allowed(allowed: str, host: str, guarded: bool, good: list[str], bad: list[str]) -> None:
    is_allowed = allowed_hosts(allowed, host=host, guarded=guarded)
    assert is_allowed is not None
    assert [name for name in [*good, *bad] if is_allowed(name)] == good


@pytest.mark.parametrize(
    ("allowed", "host", "guarded"),
    [("*", "127.0.0.1", False), ("auto", "0.0.0.0", False), ("auto", "127.0.0.1", True)],
)
def test_when_any_name_will_do(allowed: str, host: str, guarded: bool) -> None:
    assert allowed_hosts(allowed, host=host, guarded=guarded) is None


async def test_a_page_that_points_its_name_here_reads_nothing(tmp_path: Path) -> None:
    rebound = {"host": "evil.example:8000"}
    async with client(make_app(speaking(), allowed_hosts="auto")) as http:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            error_of(await http.get(path, headers=rebound), 400, "host_not_allowed")
        assert (await http.get("/health/live", headers=rebound)).status_code == 200
        assert (await http.get("/v1/models", headers={"host": "localhost:8000"})).status_code == 200
    keys = write_keys(tmp_path / "keys.yaml", alice={})
    async with client(make_app(speaking(), allowed_hosts="auto", keys=str(keys))) as http:
        assert (await http.get("/v1/models", headers=rebound)).status_code == 401  # the key protects it


async def test_the_docs_load_nothing_from_anywhere() -> None:
    async with client(make_app(speaking())) as http:
        page = await http.get("/docs")
        assert (await http.get("/redoc")).status_code == 404
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "POST /v1/chat/completions" in page.text
    assert "<code>temperature</code>" in page.text
    for foreign in ("http:", "https:", "//", "<script", "src="):
        assert foreign not in page.text
