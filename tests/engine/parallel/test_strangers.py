"""Strangers at the leader's port while two real nodes meet and serve: they are closed and counted, and change nothing."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from engine.channel import frame
from engine.config import host_and_port
from engine.errors import ConfigError, RankError
from engine.parallel import node as node_module
from engine.parallel import nodes as nodes_module
from engine.parallel.link import RankLoaded
from engine.parallel.node import Node
from engine.parallel.nodes import Nodes, hello
from engine.parallel.secret import NodeSecret, ProofError
from engine.step.build import build
from tests.engine.models.mla.kit import tiny_deepseek
from tests.engine.parallel.test_nodes import agent, free_port, secret_file, until
from tests.engine.parallel.test_parallel import config_of, greedy

pytestmark = pytest.mark.process

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v32")
    tiny_deepseek("deepseek_v32", path)
    return path


def random_bytes(sock: socket.socket) -> None:
    sock.sendall(os.urandom(100_000))


def a_huge_length(sock: socket.socket) -> None:
    sock.sendall(b"\x0b\xdc\xba\x98" + bytes(1 << 20))  # 199 MB, as the length of a frame


def half_a_proof(sock: socket.socket) -> None:
    sock.sendall(b"dsanode1" + bytes(20))
    sock.recv(1000)
    time.sleep(0.3)


def nothing(sock: socket.socket) -> None:
    time.sleep(0.3)


def a_wrong_secret(sock: socket.socket) -> None:
    with pytest.raises(ProofError):
        NodeSecret(b"wrong" * 10).prove(sock, 5)


def no_secret(sock: socket.socket) -> None:
    with pytest.raises(ProofError):
        NodeSecret().prove(sock, 5)


def messages(own: bytes) -> Callable[[socket.socket], None]:
    """The messages of a real node, without the proof."""
    return lambda sock: sock.sendall(own + frame(RankLoaded(rank=1, num_bytes=1)))


def replay(recorded: bytes) -> Callable[[socket.socket], None]:
    """All that a real node said once: its proof and its messages."""
    return lambda sock: sock.sendall(recorded)


def record(secret: bytes, own: bytes) -> bytes:
    """What a node sends that proves itself to some leader, and says hello."""
    leader, node = socket.socketpair()
    with leader, node:
        thread = threading.Thread(target=NodeSecret(secret).admit, args=(leader, 5))
        thread.start()
        node.recv(40, socket.MSG_PEEK | socket.MSG_WAITALL)
        sent: list[bytes] = []

        class Recorder:
            """A socket that remembers what was sent."""

            settimeout, recv = node.settimeout, node.recv

            def sendall(self, data: bytes) -> None:
                sent.append(data)
                node.sendall(data)

        NodeSecret(secret).prove(Recorder(), 5)  # type: ignore[arg-type]
        thread.join(5)
    return b"".join(sent) + own


@contextmanager
def strangers(leader: str, folder: Path) -> Iterator[list[int]]:
    """Callers of every kind, again and again. Yields a list that has one entry for each call that got through."""
    own = frame(hello(str(folder), None))
    kinds = [
        random_bytes, a_huge_length, half_a_proof, nothing, a_wrong_secret, no_secret, messages(own),
        replay(record(SECRET, own)),
    ]  # fmt: skip
    over, calls = threading.Event(), []

    def bother(first: int) -> None:
        for kind in itertools.islice(itertools.cycle(kinds), first, None):
            if over.is_set():
                return
            with suppress(OSError), socket.create_connection(host_and_port(leader), 1) as sock:
                calls.append(1)
                kind(sock)
            over.wait(0.02)

    threads = [threading.Thread(target=bother, args=(first,)) for first in range(0, len(kinds), 2)]
    for thread in threads:
        thread.start()
    yield calls
    over.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_nodes_meet_and_serve_among_strangers(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = secret_file(tmp_path, SECRET)
    leader = f"127.0.0.1:{free_port()}"
    config = msgspec.structs.replace(config_of(folder, 2), nodes=2, leader=leader, node_secret_file=secret)
    lost: list[str] = []
    with strangers(leader, folder) as calls:
        helper: list[threading.Timer] = []

        def progress(stage: str, done: int, total: int) -> None:
            """The node starts only when strangers have been at the port for a while."""
            if stage.startswith("waiting") and not helper:
                helper.append(threading.Timer(0, begin))
                helper[0].start()

        def begin() -> None:
            until(lambda: len(calls) > 40)
            node.enter()

        node = _Late(folder, leader, secret)
        try:
            with caplog.at_level(logging.WARNING):
                built = build(config, progress, on_lost=lost.append)
            before = greedy(built)
            assert greedy(built) == before == greedy(build(config_of(folder, 1)))
            assert lost == []
            built.close()
        finally:
            node.leave()
    said = [record.getMessage() for record in caplog.records]
    reasons = ("it speaks another protocol", "it does not know the secret", "it closed the connection before")
    for reason in reasons:
        assert any(reason in line for line in said), (reason, said)
    assert any("callers at" in line and line.endswith("were no nodes") for line in said)
    assert len([line for line in said if "was no node:" in line]) <= nodes_module._LOGGED_STRANGERS


class _Late:
    """A node that starts when it is told to."""

    def __init__(self, folder: Path, leader: str, secret: str) -> None:
        self._made = agent(folder, leader, f"--node-secret-file={secret}")
        self._entered = False

    def enter(self) -> None:
        self._made.__enter__()
        self._entered = True

    def leave(self) -> None:
        if self._entered:
            self._made.__exit__(None, None, None)


@pytest.fixture
def door(folder: Path, tmp_path: Path) -> Iterator[tuple[Nodes, str]]:
    """A leader with a secret, that waits."""
    leader = f"127.0.0.1:{free_port()}"
    config = msgspec.structs.replace(
        config_of(folder, 2), nodes=2, leader=leader, node_secret_file=secret_file(tmp_path, SECRET)
    )
    nodes = Nodes(config, lambda loaded: None, lambda reason: pytest.fail(reason))
    yield nodes, leader
    nodes.close()


def test_a_hello_without_a_proof_takes_no_place_and_no_memory(folder: Path, door: tuple[Nodes, str]) -> None:
    nodes, leader = door
    own = frame(hello(str(folder), None))
    for act in (messages(own), replay(record(SECRET, own)), a_huge_length, random_bytes):
        before = nodes.strangers
        with socket.create_connection(host_and_port(leader), 10) as sock:
            with suppress(OSError):  # the leader may have closed it before all was sent
                act(sock)
            until(lambda: nodes.strangers > before)  # noqa: B023
        assert nodes._nodes == []
    with socket.create_connection(host_and_port(leader), 10) as sock:
        NodeSecret(SECRET).prove(sock, 5)
        sock.sendall(b"\x0b\xdc\xba\x98")  # known, and wrong: a frame of 199 MB is refused by its length
        assert sock.recv(1) == b""
    assert nodes._nodes == []


def test_callers_that_prove_nothing_do_not_keep_a_node_out(folder: Path, door: tuple[Nodes, str]) -> None:
    nodes, leader = door
    address = host_and_port(leader)
    idle = [socket.create_connection(address, 10) for _ in range(nodes_module._UNPROVED + 8)]
    try:
        until(lambda: nodes.strangers >= 8, 5)  # the oldest were closed, long before their time was over
        with socket.create_connection(address, 10) as sock:
            NodeSecret(SECRET).prove(sock, 5)
            sock.sendall(frame(hello(str(folder), None)))
            until(lambda: len(nodes._nodes) == 1)
    finally:
        for caller in idle:
            caller.close()


def test_a_node_with_another_secret_says_so_and_tries_again_until_its_time_is_over(
    folder: Path,
    door: tuple[Nodes, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes, leader = door
    pauses: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)  # only its pauses take time
    monkeypatch.setattr(node_module, "time", clock)
    (tmp_path / "other").mkdir()
    other = secret_file(tmp_path / "other", b"x" * 32)
    sentence = "the leader does not take this node for one of its own; give both the same --node-secret-file"
    with caplog.at_level(logging.INFO), pytest.raises(RankError, match=f"for 1.5 s: {sentence}$"):
        Node(str(folder), None, leader, 1.5, other).run()
    assert [line for line in caplog.messages if sentence in line] == [
        f"waiting for the leader at {leader}: {sentence}"
    ]
    assert pauses == [1.0, 1.0]
    until(lambda: nodes.strangers == 3)


def test_other_hosts_need_a_secret(folder: Path, tmp_path: Path) -> None:
    leader = "192.0.2.1:7000"
    config = msgspec.structs.replace(config_of(folder, 2), nodes=2, leader=leader)
    with pytest.raises(
        ConfigError, match="anybody who reaches it could join as a node; give node_secret_file"
    ):
        build(config)
    open_file = tmp_path / "open"
    open_file.write_bytes(SECRET)
    open_file.chmod(0o644)
    for act in (
        lambda: build(msgspec.structs.replace(config, node_secret_file=str(open_file))),
        lambda: Node(str(folder), None, leader, 0, str(open_file)),
    ):
        with pytest.raises(ConfigError, match="which other users can read or change"):
            act()
