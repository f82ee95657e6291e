"""The process group: the ranks meet, and sum tensors over NCCL or gloo."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from engine.parallel.ranks import Ranks

_SIOCGIFADDR = 0x8915  # linux/sockios.h


class Meeting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where ranks find one another.

    On one host that is a file in a folder that only this user can read, and they talk over the loopback: a
    rendezvous on a TCP port takes anybody who can reach it for a rank. Over several hosts there is no other way.
    """

    file: str | None = None  # a path that no file is at yet
    host: str = ""  # else a numeric address of the leader's,
    port: int = 0  # and the port of its store


class Door:
    """The leader's end of a meeting over several hosts: a store on a port of one of its addresses."""

    def __init__(self, host: str, count: int) -> None:
        """Listen on any free port of `host`, a numeric address, and of no other."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.bind((host, 0))
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
    """Wait until all `count` ranks are here.

    Args:
        rank: this process
        count: how many there are
        meeting: the same for all
        device: of this rank: NCCL on CUDA, gloo on the CPU
        address: over several hosts, the address of this one by which it talks to the leader
        store: the leader's own, see `Door`
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
    """Forget the group; NCCL's ends with the process, since leaving it in order needs every rank alive."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def interface_of(address: str) -> str | None:
    """The network interface that has a numeric address; None where that cannot be told."""
    for _, name in socket.if_nameindex():
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:  # an interface without an IPv4 address, or not on Linux
            continue
        if socket.inet_ntoa(packed[20:24]) == address:
            return name
    return None


def _loopback() -> str | None:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def _sum(x: Tensor) -> Tensor:
    """In float32, rounded once to x's dtype: with a rounding a rank, more ranks would compute less exactly."""
    wide = x.float().contiguous()
    dist.all_reduce(wide)
    return wide.to(x.dtype)
