"""Sources that ask for far more than they have, made by hand."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_AS, getrlimit, setrlimit
from typing import Any

import torch

DOUBLED = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60
"""A tuple of two tuples, each of two tuples, and so on; 2^60 in all."""
TERA = 1 << 38


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


class Stored:
    """Pickled as the storage of a tensor."""

    def __init__(self, key: str, numel: int, kind: Any = torch.FloatStorage) -> None:
        self.identity = ("storage", kind, key, "cpu", numel)


class _Pickler(pickle.Pickler):
    old = False

    def persistent_id(self, obj: Any) -> Any:
        return (obj.identity + (None,) * self.old) if isinstance(obj, Stored) else None


def pickled(value: Any, *, old: bool = False) -> bytes:
    """As ``torch.save`` pickles, with :class:`Call` and :class:`Stored` in it."""
    data = io.BytesIO()
    pickler = _Pickler(data, protocol=2)
    pickler.old = old
    pickler.dump(value)
    return data.getvalue()


def archive(file: Path, data: bytes, parts: dict[str, bytes] | None = None, packed: bool = False) -> None:
    """A zip archive as ``torch.save`` writes it."""
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as made:
        made.writestr("a/data.pkl", data)
        made.writestr("a/byteorder", b"little")
        for key, content in (parts or {}).items():
            made.writestr(f"a/data/{key}", content)
        made.writestr("a/version", b"3\n")


def old_archive(file: Path, value: Any, contents: bytes = b"") -> None:
    """A file in the format before zip archives."""
    heads = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    file.write_bytes(
        b"".join(pickle.dumps(head, 2) for head in heads)
        + pickled(value, old=True)
        + pickle.dumps(["0"], 2)
        + struct.pack("<q", len(contents) // 4)
        + contents
    )


def tensor(numel: int, *, stored: int = 1, stride: int = 1, old: bool = False) -> Call:
    """A float32 tensor of ``numel`` elements in a storage of ``stored``."""
    del old
    return Call(torch._utils._rebuild_tensor_v2, Stored("0", stored), 0, (numel,), (stride,), False, {})


def safetensors_file(file: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file, with any header, and any length announced of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@contextmanager
def little_memory(more_bytes: int = 1 << 30) -> Iterator[None]:
    """No more address space than this much above what is taken now."""
    soft, hard = getrlimit(RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    setrlimit(RLIMIT_AS, (taken + more_bytes, hard))
    try:
        yield
    finally:
        setrlimit(RLIMIT_AS, (soft, hard))
