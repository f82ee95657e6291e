"""Where a server listens: over TLS, on a Unix socket, and what is said when it cannot."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import stat
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from server.listen import ServeError, bind, bind_unix, check_certificate, listening
from server.serve import loop_factory, run
from server.settings import Settings, SettingsError, load_settings
from tests.server.kit import TEXT, PlainChat, completion_body, make_config, speaking


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {key} -out {cert}"
    )
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl here")
    return cert, key


def serve_and(work: Callable[[], Awaitable[None]], listener: socket.socket, **config: object) -> None:
    """Run a server as `dsa serve` does, with its event loop; do the work; stop it with a signal."""

    async def both() -> None:
        serving = asyncio.create_task(
            run(make_config(**config), speaking("hello"), TEXT, PlainChat(), listener)
        )
        await asyncio.sleep(0.3)
        try:
            await work()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            assert await serving == 0

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(both())


def test_https(certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    cert, key = map(str, certificate)
    check_certificate(cert, key)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]

        async def work() -> None:
            trusted = ssl.create_default_context(cafile=cert)
            async with httpx.AsyncClient(base_url=f"https://localhost:{port}", verify=trusted) as http:
                answer = await http.post("/v1/completions", json=completion_body())
                assert answer.json()["choices"][0]["text"] == "hello"
                streamed = await http.post("/v1/completions", json=completion_body(stream=True))
                assert streamed.text.endswith("data: [DONE]\n\n")
                large = await http.post("/v1/completions", content=b"x" * (1 << 20))
                assert large.status_code == 413
            async with httpx.AsyncClient() as http:
                with pytest.raises(httpx.HTTPError):
                    await http.get(f"http://localhost:{port}/health")

        serve_and(work, listener, ssl_certfile=cert, ssl_keyfile=key)
    assert f"ready at https://127.0.0.1:{port} - try: curl https://127.0.0.1" in capsys.readouterr().out


def test_a_unix_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dsa.sock"
    with listening(Settings(uds=str(path))) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660

        async def work() -> None:
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(base_url="http://any.name", transport=transport) as http:
                answer = await http.post("/v1/completions", json=completion_body())
                assert answer.json()["choices"][0]["text"] == "hello"

        serve_and(work, listener, uds=str(path), allowed_hosts="auto")
    assert f"ready at {path} - try: curl http://localhost/v1/chat/completions --unix-socket {path}" in (
        capsys.readouterr().out
    )
    assert not path.exists()


def test_a_socket_of_the_dead_is_replaced_and_one_of_the_living_is_not(tmp_path: Path) -> None:
    path = tmp_path / "dsa.sock"
    bind_unix(path).close()
    assert path.exists()
    with bind_unix(path), pytest.raises(ServeError, match="another process listens on"):
        bind_unix(path)
    path.unlink()
    path.write_text("a file of somebody's")
    with pytest.raises(ServeError, match="cannot listen on"):
        bind_unix(path)
    assert path.read_text() == "a file of somebody's"


def test_a_certificate_that_cannot_be_used(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    check_certificate(None, None)
    for pair in ((cert, None), (cert, cert), (str(tmp_path / "none.pem"), key)):
        with pytest.raises(ServeError, match="the certificate .* cannot be used"):
            check_certificate(*pair)
    with pytest.raises(SettingsError, match="--ssl-keyfile needs --ssl-certfile"):
        load_settings({"ssl_keyfile": key}, {})
