"""The leader's side of the other nodes: it accepts and checks them, sends them plans, and notices when one is gone.

A caller has to prove first that it knows the secret (`engine.parallel.secret`). Nothing that a stranger sends is decoded,
takes memory or lasts, and the leader goes on waiting for its nodes. Messages are decoded into plain types, never pickle.
NCCL's and gloo's own ports cannot ask for a secret: use a network that only the nodes can reach.
"""

from __future__ import annotations

import importlib.metadata
import ipaddress
import logging
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from engine.config import EngineConfig, host_and_port
from engine.errors import ConfigError, ProtocolError
from engine.parallel.fingerprint import fingerprint
from engine.parallel.group import Meeting
from engine.parallel.link import MAX_MEETING_BYTES, FromWorker, Hello, Link, Progress, Welcome
from engine.parallel.secret import NodeSecret, ProofError, read_secret
from engine.protocol import Failed

if TYPE_CHECKING:
    from engine.parallel.crew import OnFailed, OnLoaded

_log = logging.getLogger(__name__)

_PROOF_SECONDS = 10.0  # time for a caller to prove itself, and then again to send its `Hello`
_UNPROVED = 64  # callers at once that have not proved themselves; of more, the first are closed
_LOGGED_STRANGERS = 20  # of each leader; the others are only counted
_LOOKUP_SECONDS = 60.0  # a host's name may become known only after the host has started
_POLL_SECONDS = 0.2
_SILENT_SECONDS = 20  # a host that does not answer for so long is gone


@dataclass(eq=False)
class _Node:
    link: Link
    name: str  # its address and port
    address: str


class Nodes:
    """All nodes except this one, which is the leader. The callbacks are called from threads.

    Args:
        config: the engine's; `nodes` and `leader` say how many nodes there are and where they join
        on_loaded: called when a rank of another node has loaded its part of the model
        on_failed: called with the reason when a node is gone, unless `close` was called

    Raises:
        ConfigError: the leader's address does not belong to this host, is taken, or can be reached from other hosts and
            there is no secret; or the secret's file is not usable.
    """

    def __init__(self, config: EngineConfig, on_loaded: OnLoaded, on_failed: OnFailed) -> None:
        self._config = config
        self._on_loaded = on_loaded
        self._on_failed = on_failed
        self._secret: NodeSecret = read_secret(config.node_secret_file)
        self._own = hello(config.weights, config.overlay)
        self._changed = threading.Condition()
        self._nodes: list[_Node] = []
        self._unproved: deque[socket.socket] = deque()
        self._started = False
        self._closing = False
        self._listener = _listen(config.leader or "", self._secret)
        self.address: str = self._listener.getsockname()[0]
        self.strangers = 0  # callers that were no nodes
        threading.Thread(target=self._accept, daemon=True).start()

    def gather(self, progress: Progress) -> list[str]:
        """Wait until all nodes have joined; return their numeric addresses. After this no node can join or leave."""
        wanted, stage = self._config.nodes - 1, f"waiting for the other nodes at {self._config.leader}"
        with self._changed:
            while len(self._nodes) < wanted:
                progress(stage, len(self._nodes), wanted)
                self._changed.wait()
            self._started = True
        progress(stage, wanted, wanted)
        self._listener.close()  # a node that comes later tries again until a new engine opens the port
        if self.strangers:
            _log.warning("%d callers at %s were no nodes", self.strangers, self._config.leader)
        return [node.address for node in self._nodes]

    def assign(self, meeting: Meeting) -> None:
        """Give each node its ranks, and say where all ranks meet."""
        each = self._config.devices_a_node
        for place, node in enumerate(self._nodes, 1):
            _log.info("node %s has ranks %d to %d", node.name, place * each, place * each + each - 1)
            with suppress(OSError):  # the node is already gone: its reader will report it
                node.link.send(Welcome(config=self._config, first_rank=place * each, meeting=meeting))

    def forward(self, body: bytes) -> None:
        """Send an encoded plan to all nodes.

        Raises:
            OSError: a node is gone.
        """
        for node in self._nodes:
            node.link.forward(body)

    def close(self) -> None:
        """Close all connections. Each node sees the end of its stream and ends its workers."""
        self._closing = True
        self._listener.close()
        for node in self._nodes:
            node.link.close()

    def _accept(self) -> None:
        """Accept callers, each with a thread of its own. This runs in a thread."""
        self._listener.settimeout(_POLL_SECONDS)
        while not (self._started or self._closing):
            try:
                caller, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not (
                    self._started or self._closing
                ):  # no descriptor is free, say: the next caller may find one
                    _log.warning("no caller can be accepted at %s: %s", self._config.leader, error)
                    time.sleep(_POLL_SECONDS)
                continue
            self._make_room(caller)
            threading.Thread(target=self._serve, args=(caller, address), daemon=True).start()

    def _make_room(self, caller: socket.socket) -> None:
        """Close the caller that has waited longest if too many have proved nothing. A node needs milliseconds for it."""
        with self._changed:
            self._unproved.append(caller)
            longest = self._unproved.popleft() if len(self._unproved) > _UNPROVED else None
        if longest is not None:
            with suppress(OSError):
                longest.shutdown(socket.SHUT_RDWR)  # its thread sees the end and closes it

    def _serve(self, caller: socket.socket, address: tuple[str, int]) -> None:
        """Check one caller, read its messages and report its end. Each caller has a thread for this."""
        name = f"{address[0]}:{address[1]}"
        link = Link(caller, MAX_MEETING_BYTES)
        try:
            self._prove(caller)
            caller.settimeout(_PROOF_SECONDS)
            said = link.receive(msgspec.msgpack.Decoder(Hello))
            if said is None:
                raise ProofError("it did not say what it has")
            caller.settimeout(None)
            keep_alive(caller)
        except (ProofError, ProtocolError, OSError) as error:
            self._count_stranger(name, str(error))
            link.close()
            return
        node = _Node(link, name, address[0])
        refusal = _difference(self._own, said)
        with self._changed:
            joined = refusal is None and not self._started and len(self._nodes) < self._config.nodes - 1
            if joined:
                self._nodes.append(node)
                self._changed.notify_all()
        if joined:
            self._listen_to(node)
            return
        if refusal is not None:  # else all nodes have joined already
            _log.warning("node %s was turned away: %s", name, refusal)
            with suppress(OSError):
                link.send(Failed(message=refusal))
        link.close()

    def _prove(self, caller: socket.socket) -> None:
        try:
            self._secret.admit(caller, _PROOF_SECONDS)
        finally:
            with self._changed, suppress(ValueError):  # others may have needed its room
                self._unproved.remove(caller)

    def _count_stranger(self, name: str, reason: str) -> None:
        with self._changed:
            self.strangers += 1
            count = self.strangers
        if count <= _LOGGED_STRANGERS:
            _log.warning("a caller at %s was no node: %s", name, reason)
        if count == _LOGGED_STRANGERS:
            _log.warning("more such callers are counted, and not logged")

    def _listen_to(self, node: _Node) -> None:
        decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        told = "its connection was closed"
        try:
            while (message := node.link.receive(decoder)) is not None:
                if isinstance(message, Failed):
                    told = message.message
                    break
                self._on_loaded(message)
        except (ProtocolError, OSError) as error:
            told = str(error)
        with self._changed:
            if not self._started:
                self._nodes.remove(node)
                node.link.close()
                return
        if not self._closing:
            self._on_failed(f"node {node.name}: {told}")


def hello(weights: str, overlay: str | None) -> Hello:
    """Describe this host's program and model, so that the leader can compare them with its own.

    Raises:
        ConfigError: the model cannot be read.
    """
    try:
        model = fingerprint(Path(weights), None if overlay is None else Path(overlay))
    except OSError as error:
        raise ConfigError(f"the model cannot be read: {error}") from error
    return Hello(
        version=importlib.metadata.version("dsa-serve"),
        torch=str(torch.__version__),
        model=model,
        path=weights,
    )


def keep_alive(sock: socket.socket) -> None:
    """Make the system notice that the other host is gone, even if it could not close its end."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _SILENT_SECONDS // 4),
        ("TCP_KEEPINTVL", _SILENT_SECONDS // 4),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", _SILENT_SECONDS * 1000),
    ):
        if hasattr(socket, name):  # Linux
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _difference(own: Hello, said: Hello) -> str | None:
    """Why a node cannot join, as a sentence; None if it can."""
    for what, mine, theirs in (("dsa-serve", own.version, said.version), ("torch", own.torch, said.torch)):
        if mine != theirs:
            return f"the leader has {what} {mine} and this node {theirs}; install the same on all nodes"
    if own.model != said.model:
        return (
            f"the files of {said.path} on this node are not those of {own.path} on the leader; give both the same "
            "model, and the same overlay or none"
        )
    return None


def _listen(leader: str, secret: NodeSecret) -> socket.socket:
    host, port = host_and_port(leader)
    until = time.monotonic() + _LOOKUP_SECONDS
    while True:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            break
        except socket.gaierror as error:
            if time.monotonic() > until:
                raise ConfigError(
                    f"leader is {leader}, but {host} has no address: {error.strerror}"
                ) from error
            time.sleep(1.0)
    number = ipaddress.ip_address(address[0])
    if number.is_unspecified:
        raise ConfigError(
            f"leader is {leader}, which is every network; name the address by which the other nodes reach this host"
        )
    if not (secret or number.is_loopback):
        raise ConfigError(
            f"leader is {leader}, where anybody who reaches it could join as a node; give node_secret_file, a file that "
            "only the nodes have, and the same to each dsa worker as --node-secret-file"
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen at {leader}: {error.strerror}; leader must be a free port of an address of this host"
        ) from error
    return listener
