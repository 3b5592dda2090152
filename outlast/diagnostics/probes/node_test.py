"""Whether a node computes right and fast, copies memory, and writes its disk; within seconds, whatever hangs."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

PART_S = 0.1
"""How long each part is repeated. The best time counts: others use the node, too."""
DISK_TIMES = 3
MATRIX = 192
MEMORY_BYTES = 32 << 20
DISK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTest:
    """What a node can do; None where a part has not ended in time or failed, with the reason."""

    compute_flops: float | None = None
    """Floating-point operations a second, in matrix products; exact ones, which are checked."""
    memory_bytes_s: float | None = None
    """Bytes copied a second, out of reach of the caches; the copy is checked."""
    disk_bytes_s: float | None = None
    """Bytes written and synced a second; what is read back is checked."""
    reasons: tuple[str, ...] = ()
    """What failed or was wrong: ``memory: the copy differs``."""

    def as_json(self) -> dict[str, Any]:
        """Of numbers and texts."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """What :meth:`as_json` gave, from a node that may have another version.

        Raises:
            TypeError, ValueError: it is none.
        """
        numbers = {
            name: None if raw.get(name) is None else float(raw[name])
            for name in ("compute_flops", "memory_bytes_s", "disk_bytes_s")
        }
        return cls(**numbers, reasons=tuple(str(one)[:200] for one in raw.get("reasons", ())[:9]))


class _Wrong(Exception):
    """A result is not what it must be."""


def self_test(folder: Path, limit_s: float = 5.0) -> NodeTest:
    """Try out this node. Uses one core and 64 MiB for less than a second if all is well, and leaves nothing behind.

    Args:
        folder: the disk that is tried out; it has to exist.
        limit_s: for each part. One that hangs, as on a network file system that is away, is left behind in a thread.
    """
    values: dict[str, float | None] = {}
    reasons = []
    parts: dict[str, tuple[str, Callable[[], float]]] = {
        "compute": ("compute_flops", _compute),
        "memory": ("memory_bytes_s", _memory),
        "disk": ("disk_bytes_s", lambda: _disk(folder)),
    }
    for name, (field, part) in parts.items():
        value, reason = _within(part, limit_s)
        values[field] = value
        if reason:
            reasons.append(f"{name}: {reason}")
    return NodeTest(**values, reasons=tuple(reasons))


def _within(part: Callable[[], float], limit_s: float) -> tuple[float | None, str]:
    found: list[float] = []
    failed: list[str] = []

    def run() -> None:
        try:
            found.append(part())
        except (OSError, MemoryError, _Wrong) as error:
            failed.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=run, name="outlast-self-test", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        return None, f"no answer within {limit_s:g} s"
    return (found[0], "") if found else (None, failed[0] if failed else "it failed")


def _compute() -> float:
    """Products of whole numbers, which are exact as floats, compared with those of the integer units."""
    random = np.random.default_rng(0)
    left, right = (random.integers(-1000, 1000, (MATRIX, MATRIX)) for _ in range(2))
    exact = left @ right
    a, b = left.astype(np.float64), right.astype(np.float64)

    def multiply() -> None:
        if not np.array_equal(a @ b, exact):
            raise _Wrong("a product of matrices is wrong")

    return 2 * MATRIX**3 / _best_s(multiply)


def _memory() -> float:
    source = np.arange(MEMORY_BYTES // 8, dtype=np.uint64)
    target = np.zeros_like(source)
    took_s = _best_s(lambda: np.copyto(target, source))
    if not np.array_equal(source, target):
        raise _Wrong("the copy differs")
    return MEMORY_BYTES / took_s


def _disk(folder: Path) -> float:
    return DISK_BYTES / min(_write_and_read(folder) for _ in range(DISK_TIMES))


def _write_and_read(folder: Path) -> float:
    """Seconds of writing and syncing."""
    data = np.random.default_rng(0).bytes(DISK_BYTES)
    with tempfile.TemporaryFile(dir=folder, prefix=".outlast-probe-", buffering=0) as file:
        began_s = time.perf_counter()
        file.write(data)
        os.fsync(file.fileno())
        took_s = time.perf_counter() - began_s
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read it from the disk, where that is possible
        file.seek(0)
        if file.read() != data:
            raise _Wrong("what was read is not what was written")
    return took_s


def _best_s(part: Callable[[], None]) -> float:
    """The least that a part took, repeated for :data:`PART_S`."""
    best_s, end_s = float("inf"), time.perf_counter() + PART_S
    while True:
        began_s = time.perf_counter()
        part()
        now_s = time.perf_counter()
        best_s = min(best_s, now_s - began_s)
        if now_s >= end_s:
            return best_s
