"""One start of a run's processes, and its folder in the run's directory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 1 << 16
"""How much of the end of an events file is read: many events fit."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a run's processes, and its folder."""

    run: Path
    number: int

    @property
    def path(self) -> Path:
        """``attempts/NNNN``."""
        return self.run / "attempts" / f"{self.number:04d}"

    def log_path(self, rank: int) -> Path:
        """A rank's log."""
        return self.path / "logs" / f"rank_{rank:05d}.log"

    def events_path(self, rank: int) -> Path:
        """A rank's events."""
        return self.path / "events" / f"rank_{rank:05d}.jsonl"

    def make_folders(self) -> None:
        """Create the attempt's folders; harmless if another rank has done so."""
        for folder in ("logs", "events"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)

    def link_as_latest(self) -> None:
        """Let ``attempts/latest`` lead here."""
        link = self.path.parent / f".latest-{os.getpid()}"
        link.symlink_to(self.path.name)
        link.replace(self.path.parent / "latest")


def next_attempt(run: Path) -> Attempt:
    """The attempt after those that a run's directory has; nothing is made."""
    attempts = run / "attempts"
    taken = [int(entry.name) for entry in attempts.iterdir() if entry.name.isdecimal()] if attempts.is_dir() else []
    return Attempt(run, max(taken, default=0) + 1)


def steps_taken(run: Path) -> int:
    """The last step that any rank of a run's newest attempt with steps tells of; 0 if none does."""
    for folder in sorted((run / "attempts").glob("[0-9]*"), reverse=True):
        last = max((_last_step(path) for path in folder.glob("events/rank_*.jsonl")), default=0)
        if last:
            return last
    return 0


def _last_step(path: Path) -> int:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:  # what cannot be read tells of no step; the report names it
        return 0
    last = 0
    for line in lines:
        if b'"step":' not in line:
            continue
        try:
            last = max(last, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):  # cut off, or another's
            continue
    return last
