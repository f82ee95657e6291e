"""Packets from other hosts than the named ones do not reach the socket."""

from __future__ import annotations

import socket
import sys

import pytest

from engine.parallel.admit import admit_only
from engine.parallel.group import Door

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux filters")


def reaches(source: str, target: tuple[str, int]) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET) as caller:
        caller.settimeout(0.5)
        caller.bind((source, 0))
        try:
            caller.connect(target)
        except TimeoutError:
            return False
        return True


def test_only_named_hosts_reach_a_filtered_port() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert admit_only(listener, ["127.0.0.1", "127.0.0.5"])
        listener.listen()
        target = listener.getsockname()
        assert reaches("127.0.0.1", target)
        assert reaches("127.0.0.5", target)
        assert not reaches("127.0.0.9", target)


def test_ipv6_addresses_are_compared_whole() -> None:
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener:
        target = listener.getsockname()[:2]
        assert admit_only(listener, ["fd00::1", "::1"])
        assert reaches("::1", target)
        assert admit_only(listener, ["::2", "1::1"])
        assert not reaches("::1", target)


def test_the_store_where_ranks_meet_is_open_to_the_nodes_alone() -> None:
    door = Door("127.0.0.1", 2, ["127.0.0.7"])
    target = (door.meeting.host, door.meeting.port)
    assert reaches("127.0.0.7", target)
    assert reaches("127.0.0.1", target)
    assert not reaches("127.0.0.9", target)
