"""Another node of the engine: `python -m engine.parallel.node`, started by `dsa worker`.

A node joins the leader, starts a worker for each of its ranks, forwards plans to them and reports their failures.
When the leader's engine ends, the node ends its workers and joins the next engine. If there is no engine for
`wait_seconds`, the node ends too.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import NoReturn

import msgspec

from engine.config import EngineConfig, host_and_port
from engine.errors import ConfigError, EngineError, ProtocolError, RankError
from engine.parallel.crew import Crew
from engine.parallel.link import Hello, Link, ToNode, Welcome
from engine.parallel.nodes import hello, keep_alive
from engine.parallel.secret import ProofError, read_secret
from engine.protocol import Failed

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_PROOF_SECONDS = 10.0
_PAUSE_SECONDS = 1.0


class Node:
    """This host as a node of the engine.

    Args:
        weights, overlay: paths on this host, as in `EngineConfig`
        leader: HOST:PORT
        wait_seconds: how long to look for a leader that cannot be reached
        secret_file: as `EngineConfig.node_secret_file`, on this host

    Raises:
        ConfigError: the model or the secret cannot be read, or `leader` is no address.
    """

    def __init__(
        self,
        weights: str,
        overlay: str | None,
        leader: str,
        wait_seconds: float,
        secret_file: str | None = None,
    ) -> None:
        try:
            self._address = host_and_port(leader)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        read_secret(secret_file)
        self._leader = leader
        self._files = {"weights": weights, "overlay": overlay, "node_secret_file": secret_file}
        self._secret_file = secret_file
        self._hello: Hello = hello(weights, overlay)
        self._wait_seconds = wait_seconds
        self._working = False
        self._leaving = False

    def leave(self, *, now: bool) -> None:
        """End this process: at once with `now` or if it has no engine, else when the leader's engine has ended."""
        if now or not self._working or self._leaving:
            sys.exit(0)
        self._leaving = True
        _log.info("leaving once the leader's engine has ended; a second signal ends it now")

    def run(self) -> NoReturn:
        """Take part in one engine after another.

        Raises:
            RankError: the leader cannot be reached, or turned this node away.
        """
        while True:
            joined = self._join()
            if joined is not None:
                self._work(*joined)

    def _join(self) -> tuple[Link, Welcome, str] | None:
        """Join the leader. Return the link, its `Welcome` and this host's address; None if it left without an answer."""
        sock = self._reach()
        link = Link(sock)
        try:
            address: str = sock.getsockname()[0]
            link.send(self._hello)
            decoder: msgspec.msgpack.Decoder[ToNode] = msgspec.msgpack.Decoder(ToNode)
            answer = link.receive(decoder)
        except OSError:
            answer = None
        except BaseException:
            link.close()
            raise
        if isinstance(answer, Welcome):
            return link, answer, address
        link.close()
        if answer is not None:
            raise RankError(answer.message)
        time.sleep(_PAUSE_SECONDS)
        return None

    def _reach(self) -> socket.socket:
        """Connect to the leader; return when both have proved that they know the secret."""
        began, said = time.monotonic(), ""
        while True:
            try:
                return self._call()
            except ProofError as error:
                told, advice = str(error), ""
            except OSError as error:
                told, advice = str(error), "; is dsa serve running there with --nodes and --leader?"
            if time.monotonic() - began > self._wait_seconds:
                raise RankError(
                    f"no leader could be reached at {self._leader} for {self._wait_seconds:g} s: {told}{advice}"
                )
            if told != said:
                _log.info("waiting for the leader at %s: %s", self._leader, told)
                said = told
            time.sleep(_PAUSE_SECONDS)

    def _call(self) -> socket.socket:
        secret = read_secret(self._secret_file)  # anew, as it may have been replaced
        sock = socket.create_connection(self._address, _CONNECT_SECONDS)
        try:
            if not (secret or ipaddress.ip_address(sock.getpeername()[0]).is_loopback):
                raise ConfigError(
                    f"the leader at {self._leader} is another host, and without a secret anybody could be it; give "
                    "--node-secret-file with the leader's secret"
                )
            secret.prove(sock, _PROOF_SECONDS)
            sock.settimeout(None)
            keep_alive(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _work(self, link: Link, welcome: Welcome, address: str) -> None:
        """Run this node's workers until the leader's engine ends."""
        config: EngineConfig = msgspec.structs.replace(welcome.config, **self._files)
        ranks = range(welcome.first_rank, welcome.first_rank + config.devices_a_node)
        _log.info("ranks %d to %d of %d are on this node", ranks[0], ranks[-1], config.tensor_parallel)

        def failed(reason: str) -> None:
            _log.error("%s", reason)
            with suppress(OSError):
                link.send(Failed(message=reason))

        def loaded(message: msgspec.Struct) -> None:
            with suppress(OSError):
                link.send(message)

        crew = Crew(ranks, config, welcome.meeting, loaded, failed, address)
        try:
            self._working = True
            while (body := link.receive_body()) is not None:
                with suppress(OSError):  # a worker is gone: `failed` tells the leader, which ends the engine
                    crew.forward(body)
        except (ProtocolError, OSError) as error:
            _log.warning("%s", error)
        finally:
            self._working = False
            crew.close()
            link.close()
        _log.info("the leader's engine has ended; its workers here have, too")
        if self._leaving:
            sys.exit(0)


def main() -> None:
    """Run a node until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="checkpoint: .gguf file or folder, as the leader's")
    parser.add_argument("--overlay", help="an indexer to lay over it, as the leader's")
    parser.add_argument("--leader", required=True, metavar="HOST:PORT")
    parser.add_argument("--node-secret-file", help="the leader's secret, in a file of this host")
    parser.add_argument("--wait-seconds", type=float, default=600.0, help="(%(default)g)")
    options = parser.parse_args()
    logging.basicConfig(format="node: %(message)s", level=logging.INFO)
    try:
        node = Node(
            options.weights, options.overlay, options.leader, options.wait_seconds, options.node_secret_file
        )
        signal.signal(signal.SIGINT, lambda number, frame: node.leave(now=True))
        signal.signal(signal.SIGTERM, lambda number, frame: node.leave(now=False))
        node.run()
    except EngineError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
