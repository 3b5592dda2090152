"""A rank that found no room in shared memory trains unwatched, and says so: to its launcher, and in its events."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from outlast.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUnwatched(Event):
    """This start of the rank leaves neither a heartbeat nor collectives: a hang of it is not found."""

    kind: ClassVar[str] = "rank_unwatched"
    reason: str


def mark_unwatched(shm_dir: Path, rank: int) -> None:
    """Tell the launcher not to wait for signs of life; an empty file needs no room."""
    with suppress(OSError):  # then nothing can be said; the launcher gives it launch.startup_limit_s
        _path(shm_dir, rank).touch(mode=0o600)


def mark_watched(shm_dir: Path, rank: int) -> None:
    """Take that back."""
    _path(shm_dir, rank).unlink(missing_ok=True)


def is_unwatched(shm_dir: Path, rank: int) -> bool:
    """Whether the rank has said so."""
    return _path(shm_dir, rank).exists()


def _path(shm_dir: Path, rank: int) -> Path:
    return shm_dir / f"unwatched_{rank:05d}"
