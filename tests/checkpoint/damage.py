"""Damage to the files of a checkpoint, and what is there before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def flip(path: Path, place: float = 0.5, bit: int = 4) -> None:
    """Flip one bit; ``place`` from 0 (first byte) to 1 (last byte)."""
    raw = bytearray(path.read_bytes())
    raw[round(place * (len(raw) - 1))] ^= 1 << bit
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "flip first": lambda path: flip(path, 0.0, 0),
    "flip last": lambda path: flip(path, 1.0, 0),
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "grow": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "delete": Path.unlink,
}


def files_of(folder: Path) -> list[str]:
    """All files below a folder, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def steps_at(url: Path) -> list[str]:
    """What lies at a URL."""
    return sorted(path.name for path in url.iterdir())
