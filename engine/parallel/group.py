"""The process group: ranks of one host meet over a file, and sum tensors over NCCL or gloo."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from engine.parallel.ranks import Ranks


def join(rank: int, count: int, meeting: Path, device: torch.device) -> Ranks:
    """Wait until all `count` ranks are here.

    They meet over a file in a folder that only this user can read, and talk over the loopback: a rendezvous
    on a TCP port takes anybody who can reach it for a rank.

    Args:
        rank: this process
        count: how many there are
        meeting: a path that no file is at yet, the same for all
        device: of this rank: NCCL on CUDA, gloo on the CPU
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=FileStore(str(meeting), count),
        rank=rank,
        world_size=count,
        device_id=device if cuda else None,
    )
    return Ranks(rank, count, _sum)


def leave() -> None:
    """Forget the group; NCCL's ends with the process, since leaving it in order needs every rank alive."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _sum(x: Tensor) -> Tensor:
    """In float32, rounded once to x's dtype: with a rounding a rank, more ranks would compute less exactly."""
    wide = x.float().contiguous()
    dist.all_reduce(wide)
    return wide.to(x.dtype)
