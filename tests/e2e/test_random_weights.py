"""`dsa serve --load-format dummy` in real processes: a config.json is served, and nothing hides that it is random."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.e2e.serving import Server
from tests.engine.checkpoint.test_random_weights import folder_of
from tests.server.cli.test_main import dsa


def test_a_config_alone_is_served(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    flags = ["--device", "cpu", "--kv-cache-memory", "64MiB", "--threads", "1", "--served-model-name", "r"]
    refused = dsa("serve", str(folder), "--port", "0", "--device", "cpu")
    assert refused.returncode == 1
    server = Server(str(folder), "--load-format", "dummy", *flags)
    try:
        server.wait_ready()
        body = {"model": "r", "prompt": [1, 2, 299], "max_tokens": 8, "ignore_eos": True}
        answer = server.post("/v1/completions", **body).json()
        assert answer["usage"]["completion_tokens"] == 8
        assert server.get("/v1/models").json()["data"][0]["random_weights"] is True
        assert "the weights are random (load_format dummy)" in server.errors
        assert "no tokenizer.json: every byte is a token" in server.errors
        chat = {"model": "r", "messages": [{"role": "user", "content": "a"}]}
        refusal = server.post("/v1/chat/completions", **chat)
        assert refusal.status_code == 400
        assert "no chat template" in refusal.text
        assert server.end(signal.SIGTERM) == 0
    finally:
        server.close()
