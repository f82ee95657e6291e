"""The exchange of proofs between leader and node, and the secret's file."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.parallel.secret import NodeSecret, ProofError, read_secret

SECRET = NodeSecret(b"a secret of the nodes, 32 bytes.")
OTHER = NodeSecret(b"another secret, also of 32 bytes")


def meet(leader: Callable[[socket.socket], None], node: Callable[[socket.socket], None]) -> tuple[str, str]:
    """Run both ends; returns what each raised, "" for nothing."""
    ends = socket.socketpair()
    said = ["", ""]

    def run(place: int, act: Callable[[socket.socket], None]) -> None:
        with ends[place] as end:
            try:
                act(end)
            except (ProofError, OSError) as error:
                said[place] = str(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((leader, node))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return said[0], said[1]


def admit(secret: NodeSecret, seconds: float = 5) -> Callable[[socket.socket], None]:
    return lambda sock: secret.admit(sock, seconds)


def prove(secret: NodeSecret, seconds: float = 5) -> Callable[[socket.socket], None]:
    return lambda sock: secret.prove(sock, seconds)


def test_two_that_know_the_secret_meet_and_nobody_else() -> None:
    assert meet(admit(SECRET), prove(SECRET)) == ("", "")
    assert meet(admit(NodeSecret()), prove(NodeSecret())) == ("", "")
    refused = "the leader does not take this node for one of its own; give both the same --node-secret-file"
    for leader, node in ((SECRET, OTHER), (SECRET, NodeSecret()), (NodeSecret(), SECRET)):
        assert meet(admit(leader), prove(node)) == ("it does not know the secret", refused)


def test_a_leader_without_the_secret_is_not_believed() -> None:
    def lies(sock: socket.socket) -> None:
        sock.sendall(b"dsanode1" + bytes(32))
        sock.recv(72)
        sock.sendall(b"\1" + bytes(32))

    assert meet(lies, prove(SECRET))[1] == "what listens there does not know the secret"
    assert meet(lambda sock: sock.sendall(bytes(40)), prove(SECRET))[1] == (
        "what listens there is no leader of this version"
    )


def test_a_leaders_proof_is_no_nodes_and_a_recorded_one_is_worth_nothing() -> None:
    record: list[bytes] = []

    def between(sock: socket.socket) -> None:
        """A node and somebody who listens to it."""
        record.append(sock.recv(40, socket.MSG_WAITALL))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(record[0])
            thread = threading.Thread(target=SECRET.prove, args=(theirs, 5))
            thread.start()
            record.append(ours.recv(72, socket.MSG_WAITALL))
            sock.sendall(record[1])
            record.append(sock.recv(33, socket.MSG_WAITALL))
            ours.sendall(record[2])
            thread.join(5)

    assert meet(admit(SECRET), between) == ("", "")
    assert record[2][:1] == b"\1"

    def replays(sent: bytes) -> Callable[[socket.socket], None]:
        def act(sock: socket.socket) -> None:
            sock.recv(40, socket.MSG_WAITALL)
            sock.sendall(sent)
            assert sock.recv(33, socket.MSG_WAITALL) == b"\0"

        return act

    assert meet(admit(SECRET), replays(record[1]))[0] == "it does not know the secret"
    assert meet(admit(SECRET), replays(record[1][:40] + record[2][1:]))[0] == "it does not know the secret"


def test_slow_and_half_callers_are_given_up_at_the_end_of_the_time() -> None:
    def drips(sock: socket.socket) -> None:
        """Sends a byte often enough for the time-out of any single read."""
        sock.sendall(b"dsanode1")
        for _ in range(30):
            time.sleep(0.05)
            sock.sendall(b"x")  # the leader has gone after half a second

    began = time.monotonic()
    leader, node = meet(admit(SECRET, 0.5), drips)
    assert re.fullmatch(r"it had sent \d+ of 32 bytes when its time was over", leader)
    assert "Broken pipe" in node or "reset" in node
    assert time.monotonic() - began < 1.4
    said = meet(admit(SECRET, 0.3), lambda sock: time.sleep(0.6))[0]
    assert said == "it had sent 0 of 8 bytes when its time was over"

    def leaves(sock: socket.socket) -> None:
        sock.recv(40, socket.MSG_WAITALL)
        sock.sendall(b"dsanode1")

    assert meet(admit(SECRET), leaves)[0] == "it closed the connection before it had proved anything"


def test_a_secrets_file_is_read_without_white_space(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"\n a secret of the nodes, 32 bytes. \r\n")
    file.chmod(0o440)  # as Kubernetes writes it for a pod's group
    assert meet(admit(read_secret(str(file))), prove(SECRET)) == ("", "")
    assert not read_secret(None)


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [
        (b"x" * 31 + b"\n", 0o600, "which has 31 bytes; a secret has 32 to 4096, such as `openssl rand"),
        (b"x" * 5000, 0o600, "which has more than the 4096 bytes that a secret may have"),
        (b"x" * 32, 0o644, r"which other users can read or change \(mode 0644, .*`chmod 600 "),
        (b"x" * 32, 0o620, r"which other users can read or change \(mode 0620, "),
    ],
)
def test_a_file_that_protects_nothing_is_refused(
    tmp_path: Path, content: bytes, mode: int, sentence: str
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=sentence):
        read_secret(str(file))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which cannot be read: No such file"):
        read_secret(str(tmp_path / "no"))
    with pytest.raises(ConfigError, match="which cannot be read: Is a directory"):
        read_secret(str(tmp_path))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="which is no file"):
        read_secret(str(tmp_path / "pipe"))
