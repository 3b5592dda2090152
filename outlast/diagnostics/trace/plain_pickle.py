"""Writes numbers, texts, lists and dictionaries as a pickle, for programs of others that read nothing else.

Nothing of outlast reads a pickle, and no class, function or reference can get into one that is written here: there is
no opcode for them.
"""

from __future__ import annotations

import struct
from typing import Any

_PROTOCOL = b"\x80\x02"
_MARK, _STOP = b"(", b"."


def plain_pickle(value: Any) -> bytes:
    """``value`` as a pickle of protocol 2.

    Raises:
        TypeError: it holds something else than None, bool, int, float, str, dict, list, and tuple (read as a list).
    """
    parts = [_PROTOCOL]
    _write(value, parts)
    parts.append(_STOP)
    return b"".join(parts)


def _write(value: Any, parts: list[bytes]) -> None:
    if value is None:
        parts.append(b"N")
    elif isinstance(value, bool):
        parts.append(b"\x88" if value else b"\x89")
    elif isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        parts.append(b"\x8a" + bytes([len(data)]) + data)
    elif isinstance(value, float):
        parts.append(b"G" + struct.pack(">d", value))
    elif isinstance(value, str):
        data = value.encode()
        parts.append(b"X" + struct.pack("<I", len(data)) + data)
    elif isinstance(value, (list, tuple)):
        parts.append(b"]" + _MARK)
        for one in value:
            _write(one, parts)
        parts.append(b"e")
    elif isinstance(value, dict):
        parts.append(b"}" + _MARK)
        for key, one in value.items():
            _write(key, parts)
            _write(one, parts)
        parts.append(b"u")
    else:
        raise TypeError(f"{type(value).__name__} is no plain value")
