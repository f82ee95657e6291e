"""One model over two nodes: real processes that meet over TCP on the loopback, each with two ranks."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from engine.channel import frame
from engine.config import EngineConfig, host_and_port
from engine.errors import ConfigError, RankError
from engine.parallel.fingerprint import fingerprint
from engine.parallel.group import Meeting, interface_of
from engine.parallel.link import Assignment, Link, ToNode
from engine.parallel.node import Node
from engine.parallel.nodes import Nodes, hello
from engine.parallel.secret import NodeSecret
from engine.protocol import Failed, SamplingParams, Submit
from engine.step.build import Built, build
from tests.engine.models.mla.kit import tiny_deepseek
from tests.engine.parallel.test_parallel import config_of, greedy

pytestmark = pytest.mark.process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Agent:
    """`python -m engine.parallel.node`, as `dsa worker` starts it."""

    def __init__(self, folder: Path, leader: str, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine.parallel.node", f"--weights={folder}", f"--leader={leader}", *flags],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def end(self) -> int:
        """Stop it as Kubernetes would; its workers must go too."""
        workers = self.workers()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        assert psutil.wait_procs(workers, timeout=10)[1] == []
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            for worker in self.workers():
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()


def secret_file(folder: Path, secret: bytes = b"0123456789abcdef0123456789abcdef") -> str:
    """A file with a secret, as the nodes have it."""
    path = folder / "secret"
    path.write_bytes(secret)
    path.chmod(0o600)
    return str(path)


@contextmanager
def agent(folder: Path, leader: str, *flags: str) -> Iterator[Agent]:
    made = Agent(folder, leader, *flags)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v32")
    tiny_deepseek("deepseek_v32", path)
    return path


def two_nodes(
    folder: Path, leader: str, ranks: int = 2, on_lost: Callable[[str], None] | None = None
) -> Built:
    return build(msgspec.structs.replace(config_of(folder, ranks), nodes=2, leader=leader), on_lost=on_lost)


def until(reached: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_draw_the_tokens_of_one_process(folder: Path) -> None:
    leader = f"127.0.0.1:{free_port()}"
    with agent(folder, leader) as other:
        built = two_nodes(folder, leader, 4)
        assert built.team is not None
        assert sorted(built.team.loaded) == [1, 2, 3]
        assert len(other.workers()) == 2
        one = build(config_of(folder, 1))
        assert greedy(built) == greedy(one)
        built.close()
        until(lambda: other.workers() == [])
        assert other.end() == 0


def test_a_lost_worker_ends_the_engine_with_the_reason(folder: Path) -> None:
    leader = f"127.0.0.1:{free_port()}"
    reasons: list[str] = []
    with agent(folder, leader) as other:  # the node is there before the leader
        built = two_nodes(folder, leader, on_lost=reasons.append)
        assert built.team is not None
        sampling = SamplingParams(max_tokens=100, seed=0, temperature=0.0)
        built.core.submit(
            Submit(request_id="z", prompt_token_ids=(1, 2, 3), sampling=sampling, index_top_k=24)
        )
        built.core.step()
        (worker,) = other.workers()
        worker.kill()
        with pytest.raises(
            RankError, match=r"^node 127.0.0.1:\d+: rank 1 of 2 failed: it was ended by signal 9$"
        ):
            built.core.step()
        until(lambda: reasons == [built.team.reason()])  # type: ignore[union-attr]
        built.close()
    assert any("waiting for the leader" in line for line in other.lines)


@pytest.mark.slow
def test_a_node_joins_one_engine_after_another_and_is_missed_as_a_whole(folder: Path) -> None:
    leader = f"127.0.0.1:{free_port()}"
    with agent(folder, leader) as other:
        texts = []
        for _ in range(2):
            built = two_nodes(folder, leader)
            texts.append(greedy(built))
            if len(texts) == 1:
                built.close()
        assert texts[0] == texts[1]
        other.process.kill()
        other.process.wait()
        with pytest.raises(RankError, match=r"^node 127.0.0.1:\d+: its connection was closed$"):
            greedy(built)
        built.close()


@pytest.fixture
def door(folder: Path) -> Iterator[tuple[Nodes, str]]:
    """A leader that waits."""
    leader = f"127.0.0.1:{free_port()}"
    config = msgspec.structs.replace(config_of(folder, 2), nodes=2, leader=leader)
    nodes = Nodes(config, lambda loaded: None, lambda reason: None)
    yield nodes, leader
    nodes.close()


def call(leader: str, data: bytes) -> object:
    """What a node gets that sends these bytes."""
    with socket.create_connection(host_and_port(leader), 10) as sock:
        NodeSecret().prove(sock, 10)
        sock.sendall(data)
        return Link(sock).receive(msgspec.msgpack.Decoder(ToNode))


def test_a_node_with_other_files_is_turned_away_with_a_sentence(
    folder: Path, door: tuple[Nodes, str], tmp_path: Path
) -> None:
    tiny_deepseek("deepseek_v32", tmp_path, seed=1)
    sentence = (
        f"the files of {tmp_path} on this node are not those of {folder} on the leader; give both the same model, and the "
        "same overlay or none"
    )
    with pytest.raises(RankError) as raised:
        Node(str(tmp_path), None, door[1], 60).run()
    assert str(raised.value) == sentence
    assert door[0]._nodes == []


@pytest.mark.slow
def test_the_command_says_so_and_leaves(door: tuple[Nodes, str], tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path, seed=1)
    with agent(tmp_path, door[1]) as other:
        assert other.process.wait(60) == 1
    assert other.lines[-1].startswith(f"error: the files of {tmp_path} on this node are not those of ")


def test_another_version_is_turned_away(folder: Path, door: tuple[Nodes, str]) -> None:
    own = hello(str(folder), None)
    for field, name in (("version", "dsa-serve"), ("torch", "torch")):
        answer = call(door[1], frame(msgspec.structs.replace(own, **{field: "0.0.1"})))
        assert isinstance(answer, Failed)
        mine = getattr(own, field)
        assert answer.message == (
            f"the leader has {name} {mine} and this node 0.0.1; install the same on all nodes"
        )


def test_a_node_that_says_something_else_gets_nothing(door: tuple[Nodes, str]) -> None:
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",  # a length of 1.2 GB
        frame(Assignment(config=EngineConfig(weights="x"), rank=1, meeting=Meeting())),
        b"\0\0\0\x05hello",
    ):
        assert call(door[1], data) is None


def test_who_leaves_before_all_are_there_is_not_counted(folder: Path, door: tuple[Nodes, str]) -> None:
    nodes, leader = door
    with socket.create_connection(host_and_port(leader), 10) as sock:
        NodeSecret().prove(sock, 10)
        Link(sock).send(hello(str(folder), None))
        until(lambda: len(nodes._nodes) == 1)
        assert call(leader, frame(hello(str(folder), None))) is None  # one too many
    until(lambda: nodes._nodes == [])


def test_a_leader_that_does_not_come_is_given_up(folder: Path) -> None:
    leader = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        RankError, match=rf"^no leader could be reached at {leader} for 0 s: .* is dsa serve running"
    ):
        Node(str(folder), None, leader, 0).run()
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        Node(str(folder), None, "leader", 0)
    with pytest.raises(ConfigError, match="the model cannot be read: .*No such file"):
        Node(str(folder / "no"), None, leader, 0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"nodes": 2, "leader": "0.0.0.0:7000"}, "which is every network; name the address"),
        ({"nodes": 2, "leader": "192.0.2.1:7000"}, "cannot listen at 192.0.2.1:7000: "),
    ],
)
def test_an_address_that_is_not_this_hosts_is_refused(
    folder: Path, settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    settings = {**settings, "node_secret_file": secret_file(tmp_path)}
    with pytest.raises(ConfigError, match=sentence):
        build(msgspec.structs.replace(config_of(folder, 2), **settings))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"nodes": 2}, "several nodes need the leader's HOST:PORT"),
        ({"leader": "a:7000"}, "several nodes need the leader's HOST:PORT"),
        ({"node_secret_file": "/run/secret"}, "node_secret_file is for several nodes"),
        ({"nodes": 3, "leader": "a:7000", "tensor_parallel": 4}, "which 3 nodes cannot share evenly"),
        *(
            ({"nodes": 2, "leader": leader}, "expected HOST:PORT")
            for leader in ("a", ":7000", "a:0", "a:70000", "a:b", "fd00::1:7000", "[a]:7000")
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(**{"weights": "x", "tensor_parallel": 2, **settings})


def test_addresses_have_a_host_and_a_port() -> None:
    assert host_and_port("10.0.0.1:7000") == ("10.0.0.1", 7000)
    assert host_and_port("[fd00::1]:7000") == ("fd00::1", 7000)
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


def test_a_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(1_000_000))
    one, two = tmp_path / "one", tmp_path / "two"
    assert fingerprint(one, None) == fingerprint(two, None) != fingerprint(one, one / "config.json")
    for change in (
        lambda: (two / "config.json").write_text("[]"),
        lambda: (two / "model.safetensors").write_bytes(bytes(999_999)),
        lambda: (two / "model.safetensors").rename(two / "other.safetensors"),
        lambda: (two / "other.safetensors").unlink(),
    ):
        before = fingerprint(two, None)
        change()
        assert fingerprint(two, None) not in (before, fingerprint(one, None))
