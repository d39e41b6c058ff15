"""Frames on a stream: four bytes of length, then that many bytes. Both ends of every channel use these two functions.

Lengths are checked before memory is taken. What a frame says is not judged here: a hostile peer may send any bytes.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
from typing import Any

LIMIT = 4 << 20
"""Longest frame in bytes."""

ABORT = b"abort"
"""What the supervisor says to a zygote to have the running job killed."""

_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


def _refuse(_: Any) -> Any:
    raise ValueError("not in this JSON dialect")


def _short_int(digits: str) -> int:
    return int(digits) if len(digits) < 20 else _refuse(digits)  # int() of a long string is quadratic


_decode = json.JSONDecoder(
    parse_int=_short_int, parse_float=_refuse, parse_constant=_refuse, object_pairs_hook=_refuse
).decode


def dumps(value: Any) -> bytes:
    """JSON on one line, ASCII."""
    return _encode(value).encode()


def loads(data: bytes) -> Any:
    """Hostile JSON: lists, strings, short integers, booleans and null only.

    Raises:
        ValueError: Anything else, bytes that are no UTF-8 too.
        RecursionError: Nested deeper than the interpreter's limit.

    Example:
        >>> loads(b'["V",0,[1,true,null]]')
        ['V', 0, [1, True, None]]
    """
    return _decode(data.decode())


def readable(descriptor: int, seconds: float) -> bool:
    """Whether something comes within so many seconds. `select` would refuse the high descriptors of a large trainer."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_line(descriptor: int, value: Any) -> None:
    """One value as a line of JSON."""
    _write(descriptor, dumps(value) + b"\n")


def write_frame(descriptor: int, payload: bytes) -> None:
    """Send one frame.

    Raises:
        ValueError: It is longer than `LIMIT`.
        OSError: The other end is gone.
    """
    if len(payload) > LIMIT:
        raise ValueError(f"a frame of {len(payload)} bytes, more than {LIMIT}")
    _write(descriptor, struct.pack("<I", len(payload)) + payload)


def read_frame(descriptor: int, limit: int = LIMIT) -> bytes:
    """Receive one frame.

    Raises:
        EOFError: The other end is gone.
        ValueError: It announces more than `limit` bytes.
    """
    (size,) = struct.unpack("<I", _read(descriptor, 4))
    if size > limit:
        raise ValueError(f"a frame of {size} bytes, more than {limit}")
    return _read(descriptor, size)


def send_with_descriptors(channel: socket.socket, payload: bytes, descriptors: list[int]) -> None:
    """One small frame and the descriptors that belong to it."""
    frame = struct.pack("<I", len(payload)) + payload
    sent = socket.send_fds(channel, [frame], descriptors)
    _write(channel.fileno(), frame[sent:])


def receive_with_descriptors(channel: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """The other side of `send_with_descriptors`.

    Raises:
        EOFError: The other end is gone.
    """
    header, descriptors, _, _ = socket.recv_fds(channel, 4, most, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    if not header:
        raise EOFError
    (size,) = struct.unpack("<I", header + _read(channel.fileno(), 4 - len(header)))
    return _read(channel.fileno(), size), descriptors


def read_all(descriptor: int) -> bytes:
    """The rest of a file; closes it."""
    with open(descriptor, "rb", buffering=0) as file:
        return file.readall() or b""
