"""The process group, in which the ranks meet and sum tensors over NCCL or gloo."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from engine.parallel.admit import admit_only
from engine.parallel.ranks import Ranks

_SIOCGIFADDR = 0x8915  # linux/sockios.h


class Meeting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the ranks find one another.

    On one host the ranks meet at a file in a folder that only this user can read, and they talk over the loopback.
    A TCP port would accept anybody who can reach it as a rank. Over several hosts a port is the only way.
    """

    file: str | None = None  # on one host: a path at which there is no file yet
    host: str = ""  # over several hosts: a numeric address of the leader
    port: int = 0  # and the port of its store


class Door:
    """The leader's end of a meeting over several hosts: a store that listens on one of its addresses.

    The store has no password, and whoever writes into it can keep the ranks from meeting. So it opens only when all nodes
    have proved who they are, and on Linux the system drops packets to its port that do not come from one of them.
    """

    def __init__(self, host: str, count: int, nodes: Sequence[str]) -> None:
        """Listen on a free port of the numeric address `host`, and on no other address.

        Args:
            host: the leader's address
            count: how many ranks there are
            nodes: the numeric addresses of the other nodes
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((host, 0))
            own = (
                ["::1" if family == socket.AF_INET6 else "127.0.0.1"] if ip_address(host).is_loopback else []
            )
            admit_only(listener, [host, *own, *nodes])
            listener.listen(count)
            self.meeting = Meeting(host=host, port=listener.getsockname()[1])
            self.store: Store = TCPStore(
                host, self.meeting.port, count, is_master=True, wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )  # fmt: skip


def join(
    rank: int,
    count: int,
    meeting: Meeting,
    device: torch.device,
    *,
    address: str = "",
    store: Store | None = None,
) -> Ranks:
    """Join the process group, and wait until all `count` ranks have joined.

    Args:
        rank: the rank of this process
        count: how many ranks there are
        meeting: where they meet; the same for all ranks
        device: this rank's device; CUDA uses NCCL, the CPU uses gloo
        address: over several hosts, this host's address on the way to the leader; else ""
        store: on the leader, the store of its `Door`; None elsewhere
    """
    interface = interface_of(address) if meeting.file is None else _loopback()
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    if store is None:
        store = (
            TCPStore(meeting.host, meeting.port, count, is_master=False)
            if meeting.file is None
            else FileStore(str(Path(meeting.file)), count)
        )
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=count,
        device_id=device if cuda else None,
    )
    return Ranks(rank, count, _sum)


def leave() -> None:
    """Leave a gloo group. An NCCL group ends with the process, because leaving it needs every rank alive."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def interface_of(address: str) -> str | None:
    """The network interface with a numeric address; None if it cannot be found."""
    for _, name in socket.if_nameindex():
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:  # an interface without an IPv4 address, or not Linux
            continue
        if socket.inet_ntoa(packed[20:24]) == address:
            return name
    with suppress(OSError), Path("/proc/net/if_inet6").open() as lines:  # Linux: address, ..., interface
        for line in lines:
            packed6, *_, name = line.split()
            if socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed6)) == address.partition("%")[0]:
                return name
    return None


def _loopback() -> str | None:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _sum(x: Tensor) -> Tensor:
    """Sum x over the ranks in float32 and round once to x's dtype.

    With a rounding for each rank, the error would grow with the number of ranks.
    """
    wide = x.float().contiguous()
    dist.all_reduce(wide)
    return wide.to(x.dtype)
