"""Has the system drop what comes to a listening socket from other hosts than the named ones.

For ports whose program cannot ask who calls. The filter is a program of the classic Berkeley packet filter, which
any process may attach to its own sockets (socket(7), SO_ATTACH_FILTER; the instructions are in linux/bpf_common.h). A
connection keeps the filter that the listening socket had when the connection was made.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
import sys
from collections.abc import Sequence

_log = logging.getLogger(__name__)

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_LOAD_WORD, _JUMP_EQUAL, _RETURN = (
    0x20,
    0x15,
    0x06,
)  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_IP_HEADER = 0xFFF00000  # SKF_NET_OFF
_SOURCE = {socket.AF_INET: 12, socket.AF_INET6: 8}  # where an IP header has the sender's address
_WHOLE = 0xFFFFFFFF


def admit_only(listener: socket.socket, addresses: Sequence[str]) -> bool:
    """Drop packets to `listener` that are not from one of these hosts. Call it before `listen`.

    Args:
        listener: a TCP socket with an IPv4 or IPv6 address of its own
        addresses: numeric addresses of the same kind

    Returns:
        Whether the system does so. Only Linux does; a refusal is logged, and the socket is then open to all hosts.
    """
    if not sys.platform.startswith("linux"):
        return False
    code = b"".join(_instructions(listener.family, addresses))
    steps = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and a pointer to them
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(steps))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError as error:
        _log.warning("the system does not filter who calls at %s: %s", listener.getsockname(), error)
        return False
    return True


def _instructions(family: int, addresses: Sequence[str]) -> list[bytes]:
    """For each address: compare it word by word with the sender's, and keep the whole packet if all are equal."""
    made = []
    for address in dict.fromkeys(addresses):
        packed = socket.inet_pton(family, address.partition("%")[0])
        words = struct.unpack(f">{len(packed) // 4}I", packed)
        for place, word in enumerate(words):
            made.append(_step(_LOAD_WORD, _IP_HEADER + _SOURCE[socket.AddressFamily(family)] + 4 * place))
            left = 2 * (len(words) - place - 1) + 1  # of this address, after the comparison
            made.append(_step(_JUMP_EQUAL, word, if_not=left))
        made.append(_step(_RETURN, _WHOLE))
    return [*made, _step(_RETURN, 0)]


def _step(code: int, value: int, if_not: int = 0) -> bytes:
    """One `struct sock_filter`: an operation, steps to skip if true and if false, and its operand."""
    return struct.pack("HBBI", code, 0, if_not, value)
