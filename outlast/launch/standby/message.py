"""What the launcher and a standby tell one another: JSON, in memory that is passed over a socket with descriptors."""

from __future__ import annotations

import array
import json
import os
import select
import socket
from typing import Any

SOCKET = "OUTLAST_STANDBY_SOCKET"
"""In a standby's environment: the descriptor of its side of the socket."""

_MOST_DESCRIPTORS = 3
_BYTE = b"."


def send(channel: socket.socket, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
    """Send a message of any size, and open files with it.

    It does not block: what is sent over the socket is one byte.

    Raises:
        OSError: the other side has gone, or does not read.
    """
    memory = os.memfd_create("outlast-standby")
    try:
        with open(os.dup(memory), "wb") as file:
            file.write(json.dumps(message).encode())
        passed = array.array("i", [memory, *descriptors])
        channel.sendmsg([_BYTE], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)], socket.MSG_DONTWAIT)
    finally:
        os.close(memory)


def receive(channel: socket.socket, timeout_s: float) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and the descriptors that came with it, which are then the caller's; None if none came in time.

    Raises:
        EOFError: the other side has gone.
        OSError: the socket cannot be read.
    """
    if not is_readable(channel, timeout_s):
        return None
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)
    data, parts, _, _ = channel.recvmsg(1, room)
    found = array.array("i")
    for level, kind, content in parts:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
    if not data or not found:
        raise EOFError("the other side has gone")
    memory, *descriptors = found
    with open(memory, "rb") as file:
        file.seek(0)
        message = json.loads(file.read())
    assert isinstance(message, dict)
    return message, descriptors


def is_readable(channel: socket.socket, timeout_s: float) -> bool:
    """Whether there is a message, or the other side has gone, within ``timeout_s``."""
    return bool(select.select([channel], [], [], max(timeout_s, 0.0))[0])
