"""The secret that all nodes of an engine share, and how two processes prove to each other that they know it.

The leader's port is open to whoever reaches its network. A caller says nothing that is decoded until it has proved that
it knows the secret, and a node sends nothing but its proof until the leader has proved the same:

    leader  mark, N                        32 random bytes
    node    mark, M, HMAC(secret, "node", N, M)
    leader  1, HMAC(secret, "leader", N, M)   or 0, and the end

All parts have fixed lengths. Both sides draw their bytes anew for each connection, so what somebody has recorded proves
nothing later; the two proofs differ, so none can be sent back to who made it (a challenge and response in both
directions, as in ISO/IEC 9798-4). The secret itself is never sent. What follows is neither encrypted nor signed: who can
change packets on their way between the nodes is not kept out by this.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import stat
import time
from pathlib import Path

from engine.errors import ConfigError, EngineError

MIN_BYTES = 32
"""The shortest secret: 256 random bits as bytes, or 192 as base64."""

_MAX_BYTES = 4096
_MARK = b"dsanode1"  # this exchange; a version that exchanges something else has another mark
_NONCE_BYTES = 32
_PROOF_BYTES = 32  # SHA-256
_YES, _NO = b"\1", b"\0"


class ProofError(EngineError):
    """The other side did not prove that it knows the secret."""


class NodeSecret:
    """What proves that a process is a node of this engine. With no bytes everybody is one."""

    def __init__(self, secret: bytes = b"") -> None:
        self._secret = secret

    def __bool__(self) -> bool:
        return bool(self._secret)

    def admit(self, caller: socket.socket, seconds: float) -> None:
        """As the leader: have the caller prove itself, and then prove to it that this is the leader.

        Args:
            caller: a connection just accepted; nothing but the exchange is read from it
            seconds: the time for the whole exchange, however slowly the bytes come

        Raises:
            ProofError: the caller is no node; the message says what it did, and the caller knows that it was refused.
            OSError: the caller is gone.
        """
        until = time.monotonic() + seconds
        ours = secrets.token_bytes(_NONCE_BYTES)
        caller.settimeout(seconds)
        caller.sendall(_MARK + ours)
        if _exactly(caller, len(_MARK), until) != _MARK:
            raise ProofError("it speaks another protocol")
        theirs = _exactly(caller, _NONCE_BYTES, until)
        proof = _exactly(caller, _PROOF_BYTES, until)
        if not hmac.compare_digest(proof, self._proof(b"node", ours, theirs)):
            caller.sendall(_NO)
            raise ProofError("it does not know the secret")
        caller.sendall(_YES + self._proof(b"leader", ours, theirs))

    def prove(self, leader: socket.socket, seconds: float) -> None:
        """As a node: prove this node to the leader, and have the leader prove itself.

        Raises:
            ProofError: the other side is not the leader, or does not take this node for one.
            OSError: the leader is gone.
        """
        until = time.monotonic() + seconds
        leader.settimeout(seconds)
        if _exactly(leader, len(_MARK), until) != _MARK:
            raise ProofError("what listens there is no leader of this version")
        theirs = _exactly(leader, _NONCE_BYTES, until)
        ours = secrets.token_bytes(_NONCE_BYTES)
        leader.sendall(_MARK + ours + self._proof(b"node", theirs, ours))
        if _exactly(leader, 1, until) != _YES:
            raise ProofError(
                "the leader does not take this node for one of its own; give both the same --node-secret-file"
            )
        if not hmac.compare_digest(
            _exactly(leader, _PROOF_BYTES, until), self._proof(b"leader", theirs, ours)
        ):
            raise ProofError("what listens there does not know the secret")

    def _proof(self, who: bytes, leader_nonce: bytes, node_nonce: bytes) -> bytes:
        return hmac.digest(self._secret, _MARK + who + leader_nonce + node_nonce, "sha256")


def read_secret(file: str | None) -> NodeSecret:
    """Read the secret from its file, without the white space around it. None: no file, and no secret.

    Raises:
        ConfigError: the file cannot be read, is not this user's alone, or has too few bytes.
    """
    if file is None:
        return NodeSecret()
    path = Path(file)
    try:
        with open(path, "rb", opener=_open) as stream:
            status = os.fstat(stream.fileno())
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"node_secret_file is {file}, which cannot be read: {error.strerror or error}"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"node_secret_file is {file}, which is no file")
    # A group may read it: Kubernetes gives a secret's file to the group of the pod.
    if status.st_mode & (stat.S_IWGRP | stat.S_IRWXO) or status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"node_secret_file is {file}, which other users can read or change (mode "
            f"{stat.S_IMODE(status.st_mode):04o}, owner {status.st_uid}); let it belong to the user who runs this and "
            f"`chmod 600 {file}`"
        )
    secret = content.strip()
    if not MIN_BYTES <= len(secret) <= _MAX_BYTES:
        raise ConfigError(
            f"node_secret_file is {file}, which has {len(secret)} bytes; a secret has {MIN_BYTES} to {_MAX_BYTES}, such "
            f"as `openssl rand -base64 32` writes"
            if len(content) <= _MAX_BYTES
            else f"node_secret_file is {file}, which has more than the {_MAX_BYTES} bytes that a secret may have"
        )
    return NodeSecret(secret)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe without a writer would never open


def _exactly(sock: socket.socket, count: int, until: float) -> bytes:
    """Read `count` bytes, all of them before `until` (of `time.monotonic`)."""
    parts = bytearray()
    while len(parts) < count:
        left = until - time.monotonic()
        if left <= 0:
            raise ProofError(f"it had sent {len(parts)} of {count} bytes when its time was over")
        sock.settimeout(left)
        try:
            part = sock.recv(count - len(parts))
        except TimeoutError:
            continue
        if not part:
            raise ProofError("it closed the connection before it had proved anything")
        parts += part
    return bytes(parts)
