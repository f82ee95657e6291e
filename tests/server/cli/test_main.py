"""The command line: help, exit codes, one sentence an error, and a chat over a pipe."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from tests.kit import ROOT


def dsa(*arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a process of its own."""
    code = "import sys; from server.cli.main import main; sys.argv[0] = 'dsa'; main()"
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DSA_") or name in ("DSA_CACHE", "DSA_LEDGER")
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=60, check=False, env=kept | environ,
    )  # fmt: skip


@pytest.mark.parametrize("command", [[], ["serve"], ["pull"], ["chat"]])
def test_help_is_there_for_every_command(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"})
    assert result.exit_code == 0
    assert "Usage" in result.output
    for word in {
        "serve": ["Server", "Memory and scheduling", "--kv-cache-memory", "--no-prefix-caching"]
    }.get("".join(command), []):
        assert word in result.output


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "environ", "code", "sentence"),
    [
        (["serve", "--port", "70000"], {}, 2, "error: --port is 70000; expected int <= 65535"),
        (["serve"], {"DSA_MAX_QUEUE": "many"}, 2, "error: DSA_MAX_QUEUE is 'many'; expected int"),
        (["serve", "--config", "none.toml"], {}, 2, "error: the settings file none.toml cannot be read"),
        (
            ["serve", "--token-budget", "1", "--max-running", "2"],
            {},
            2,
            "error: token_budget (1) must be at least max_running",
        ),
        (["serve", "nothing", "--port", "0"], {}, 1, "error: there is no model 'nothing'"),
        (
            ["serve", "--host", "203.0.113.1", "--port", "0"],
            {},
            1,
            "error: cannot listen on 203.0.113.1 port 0",
        ),
        (
            ["eval", "--corpus", ".", "--out", ".", "--answer-top-k", "256,all"],
            {},
            2,
            "error: --answer-top-k is '256,all'; expected numbers of tokens, such as 256,512",
        ),
        (
            ["eval", "--corpus", ".", "--out", ".", "--answer-top-k", "128"],
            {},
            2,
            "error: --answer-top-k names 128, which is not among --top-k: 256, 512",
        ),
        (["pull", "nothing"], {}, 1, "error: there is no model 'nothing'"),
        (["chat", "--url", "http://127.0.0.1:9"], {}, 1, "start one with `make serve`"),
        (
            ["chat", "--top-k", "some"],
            {},
            2,
            "error: --top-k is 'some'; expected a number of tokens, or dense",
        ),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], environ: dict[str, str], code: int, sentence: str
) -> None:
    result = dsa(*arguments, **environ)
    assert result.returncode == code
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.process
def test_errors_are_json_where_the_log_is() -> None:
    result = dsa("serve", "nothing", "--port", "0", "--log-format", "json")
    assert result.returncode == 1
    *_, last = [json.loads(line) for line in result.stderr.splitlines()]
    assert last["level"] == "critical"
    assert last["message"].startswith("there is no model 'nothing'")


@pytest.mark.process
def test_pull_says_where_the_model_is(default_model: Path) -> None:
    result = dsa("pull", "--verify")
    assert result.returncode == 0
    assert result.stdout == f"smollm2-135m-instruct: {default_model} (license: Apache-2.0)\n"


class ChatServer(http.server.BaseHTTPRequestHandler):
    """Repeats the last message, a letter a chunk."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self._reply(200, json.dumps({"data": [{"id": "parrot"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "refuse":
            self._reply(400, json.dumps({"error": {"message": "no."}}))
            return
        events: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant"}}]}]
        events += [{"choices": [{"delta": {"content": letter}}]} for letter in text]
        if text == "break":
            events.append({"error": {"message": "the engine died"}})
        self._reply(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def chat_url() -> Iterator[str]:
    ChatServer.bodies.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), ChatServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.process
def test_a_chat_over_a_pipe(chat_url: str) -> None:
    lines = "hello\n\nagain\n/clear\n/dance\nfresh\n/quit\nnever\n"
    result = dsa("chat", "--url", chat_url, "--top-k", "64", "--temperature", "0", stdin=lines)
    assert (result.returncode, result.stdout) == (0, "hello\nagain\nfresh\n")
    assert "no command /dance" in result.stderr
    contents = [[message["content"] for message in body["messages"]] for body in ChatServer.bodies]
    assert contents == [["hello"], ["hello", "hello", "again"], ["fresh"]]
    assert ChatServer.bodies[0] | {"messages": []} == {
        "model": "parrot", "temperature": 0, "dsa": {"top_k": 64}, "messages": [], "stream": True,
    }  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize(
    ("line", "sentence"), [("refuse", "error: no."), ("break", "error: the engine died")]
)
def test_what_the_server_refuses_ends_a_piped_chat(chat_url: str, line: str, sentence: str) -> None:
    result = dsa("chat", "--url", chat_url, stdin=f"{line}\n")
    assert result.returncode == 1
    assert sentence in result.stderr
    assert "dsa" not in ChatServer.bodies[0]
