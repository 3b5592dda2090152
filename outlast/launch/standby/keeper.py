"""Keeps a standby for each of this node's ranks, and has them take the ranks' places at a restart."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerGroup

from outlast.launch.config import LaunchConfig
from outlast.launch.imports import IMPORTS
from outlast.launch.rank_output import RankOutput
from outlast.launch.standby.handler import asking
from outlast.launch.standby.memory import free_bytes, taken_bytes
from outlast.launch.standby.process import Standby, Start

MEMORY_FACTOR = 4
"""A standby is started while this many times what it takes is free;"""
FIRST_BYTES = 600 << 20
"""what it takes, before one has been measured."""
CORES_EACH = 4
"""One standby of so many cores imports at a time, so that the ranks hardly feel it."""
MOST_LOST = 3
"""So many standbys may die in one launcher before no other is started."""

log = logging.getLogger("outlast.launch")


@dataclass
class _Place:
    """Of one local rank, in the start of now."""

    start: Start
    imports: Path
    """What the rank has imported, once it has written that down."""
    seen_s: float | None = None
    """When it was there, on the monotonic clock."""
    read_ns: int = 0
    """When what the standby imports was written."""
    standby: Standby | None = None
    bytes: int | None = None
    """What the standby takes."""
    why: str = "there is no standby for it yet"
    """... if there is none."""


class Standbys:
    """The standbys of a launcher. Call it from the main thread.

    Args:
        config: of the launcher; ``standby``, ``standby_after_s`` and ``standby_modules`` of it.
        output: of the ranks; what standbys write until they are ranks goes to its folder.
    """

    def __init__(self, config: LaunchConfig, output: RankOutput) -> None:
        self.wanted = config.standby != "off" and config.max_restarts > 0
        """Whether there shall be any."""
        output.imports_within_s = 3 * config.standby_after_s if self.wanted else None
        self._config = config
        self._folder = output.folder
        self._places: dict[int, _Place] = {}
        self._before: dict[int, _Place] = {}
        self._used = 0
        self._refused: dict[int, str] = {}
        self._lost = 0
        self._bytes = FIRST_BYTES
        self._short = False
        self._told_modules = False
        self._at_once = max(1, len(os.sched_getaffinity(0)) // CORES_EACH)

    def start(self, start: Callable[[WorkerGroup], dict[int, Any]], worker_group: WorkerGroup) -> dict[int, Any]:
        """Call torchelastic's start of the ranks, and return its process ids: standbys that are ready take places."""
        with self._starting() if self.wanted else contextlib.nullcontext():
            return start(worker_group)

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        self._before, self._places = self._places, {}
        self._used, self._refused = 0, {}
        restarts = bool(self._before)
        with asking(self._take):
            yield
        for local_rank, place in self._before.items():  # of a rank that is not on this node any more
            if place.standby is not None:
                self._refused[local_rank] = "it is not on this node any more"
                place.standby.end()
        self._before = {}
        if restarts and self.wanted:
            self._tell_start()

    def look(self) -> None:
        """Start a standby where one is due, and see what has become of the others."""
        if not self.wanted:
            return
        importing = 0
        for local_rank, place in self._places.items():
            if place.standby is not None:
                importing += self._look_at(local_rank, place)
        now_s = time.monotonic()
        for local_rank, place in self._places.items():
            if not self.wanted or importing >= self._at_once:
                return
            if place.standby is None and self._is_due(place, now_s) and self._has_room():
                self._begin(local_rank, place)
                importing += 1

    def close(self) -> None:
        """End them all."""
        self.wanted = False
        for place in (*self._places.values(), *self._before.values()):
            if place.standby is not None:
                place.standby.end()
        self._places, self._before = {}, {}

    def _take(
        self, local_rank: int, arguments: tuple[str, ...], environ: dict[str, str], stdout: int, stderr: int
    ) -> subprocess.Popen[bytes] | None:
        start = Start(arguments, environ)
        if not start.is_possible or IMPORTS not in environ:
            return None
        before = self._before.pop(local_rank, None)
        self._places[local_rank] = _Place(start, Path(environ[IMPORTS]))
        standby = before.standby if before is not None else None
        if before is None or standby is None:
            self._refused[local_rank] = before.why if before is not None else "it was not on this node before"
            return None
        why = standby.refuses(start)
        if not why:
            if standby.become(start, stdout, stderr):
                self._used += 1
                return standby.process
            why = "its standby does not answer"
        self._refused[local_rank] = why
        standby.end()
        return None

    def _tell_start(self) -> None:
        if not self._refused:
            log.warning("outlast: all %d ranks of this node go on in standby processes", self._used)
            return
        why = "; ".join(sorted(set(self._refused.values())))
        log.warning(
            "outlast: %d of this node's %d ranks go on in standby processes, the others in new interpreters: %s",
            self._used,
            self._used + len(self._refused),
            why,
        )

    def _look_at(self, local_rank: int, place: _Place) -> bool:
        """Whether this place's standby still imports."""
        standby = place.standby
        assert standby is not None
        runs, report = standby.look(), standby.report
        if not runs:
            place.standby = None
            self._tell_lost(local_rank, standby)
            return False
        if report is None:
            return True
        if place.bytes is None:
            place.bytes = taken_bytes(standby.process.pid) or self._bytes
            self._bytes = max(place.bytes, 1 << 20)
            self._tell_modules(report["failed"])
        if _written_ns(place.imports) > place.read_ns:  # by its first steps the rank has imported more
            standby.end()
            place.standby, place.seen_s = None, None
        elif report["cuda"]:
            standby.end()
            place.standby = None
            self._give_up("a package that the program imports uses CUDA while it is imported")
        return False

    def _tell_lost(self, local_rank: int, standby: Standby) -> None:
        status = standby.process.returncode
        standby.end()
        self._lost += 1
        while_ = "while it imported" if standby.report is None else "while it waited"
        what = f"the standby of local rank {local_rank} (pid {standby.process.pid}) ended with status {status} {while_}"
        if (standby.report is None and status >= 0) or self._lost >= MOST_LOST:
            self._give_up(f"{what}; what it wrote is in {standby.log}")
        else:
            log.warning("outlast: %s; another one is started", what)

    def _tell_modules(self, failed: dict[str, str]) -> None:
        if failed and not self._told_modules:
            self._told_modules = True
            some = ", ".join(f"{name} ({why})" for name, why in list(failed.items())[:3])
            log.warning("outlast: standbys cannot import what the ranks have imported, and go on without: %s", some)

    def _give_up(self, why: str) -> None:
        log.warning("outlast: %s; no more standbys are started, and restarts take new interpreters", why)
        self.close()

    def _is_due(self, place: _Place, now_s: float) -> bool:
        """Whether the rank has told what it imports, and has trained for a while since."""
        if place.seen_s is None:
            if not _written_ns(place.imports):
                return False
            place.seen_s = now_s
        return now_s - place.seen_s >= self._config.standby_after_s

    def _has_room(self) -> bool:
        free = free_bytes()
        short = free is not None and free < MEMORY_FACTOR * self._bytes
        if short and not self._short:
            log.warning(
                "outlast: no standby is started while less than %.1f GB of memory are free, %d times what one takes; "
                "there are %.1f GB",
                MEMORY_FACTOR * self._bytes / 1e9,
                MEMORY_FACTOR,
                (free or 0) / 1e9,
            )
        self._short = short
        return not short

    def _begin(self, local_rank: int, place: _Place) -> None:
        try:
            place.read_ns = _written_ns(place.imports)
            plan = json.loads(place.imports.read_text(encoding="utf-8"))
            plan["modules"] += self._config.standby_modules
            place.standby = Standby(place.start, plan, self._folder / f"standby_{local_rank}.log")
        except (OSError, ValueError, KeyError) as error:
            self._give_up(f"no standby can be started: {error}")


def _written_ns(path: Path) -> int:
    """When a file was written; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
