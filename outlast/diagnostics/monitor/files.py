"""Small files of /proc and /sys, any of which may be absent, closed to this user, or of another kernel's format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


class SystemFiles:
    """Reads files below a root; what cannot be read is remembered, each kind once.

    Args:
        root: where ``proc``, ``sys`` and ``dev`` are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.absent: dict[str, str] = {}
        """By kind, such as ``pressure``, why its first file could not be read."""

    def text(self, path: str | Path, kind: str = "") -> str | None:
        """What a file holds; None if it cannot be read.

        Args:
            path: relative to the root.
            kind: what is absent without it; empty if its absence means nothing, as that of a process.
        """
        name = os.path.join(self.root, path)
        try:
            with open(name, errors="replace") as file:  # pathlib takes as long as the system itself
                return file.read()
        except OSError as error:
            self.note(kind, f"{name}: {error.strerror}")
            return None

    def note(self, kind: str, why: str) -> None:
        """Remember that something is not seen here; only the first reason of a kind counts."""
        if kind:
            self.absent.setdefault(kind, why)

    def glob(self, pattern: str) -> list[Path]:
        """Files that exist, in order."""
        return sorted(self.root.glob(pattern))


def counters(text: str) -> dict[str, int]:
    """The lines ``NAME NUMBER`` of a file such as ``/proc/vmstat`` or ``cpu.stat``; other lines are skipped."""
    found = {}
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        if number.strip().isdecimal():
            found[name] = int(number)
    return found


def grown(before: Mapping[str, float] | None, after: Mapping[str, float], name: str) -> float:
    """By how much a counter has grown; 0 where it is new, missing, or began anew."""
    if before is None or name not in before or name not in after:
        return 0.0
    return max(0.0, after[name] - before[name])
