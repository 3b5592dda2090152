"""Follows the events of one node while they are written."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from outlast.diagnostics.report.load import NODE_KINDS
from outlast.errors import DiagnosticsError
from outlast.events import GoodputMeasured, Record, parse_event

READ_BYTES = 4 << 20
"""Read of each file at a time."""
AHEAD_S = 60.0
"""An event that is so far in the future was written before the clock was set back, and is not waited for."""
Told = tuple[int, Record]
"""An event, and the attempt that it is of; 0 for a launcher's."""


class NodeEvents:
    """The events of a node's launcher and of its ranks, oldest first, as they come.

    Which ranks are the node's is told by its launcher: by generation, because ranks may move between nodes.

    Args:
        run_dir: the run's directory.
        agent: the file of the node's launcher; None where there is none.
        since_t: older events are of earlier launches, and are left out.
        ranks: without a launcher, the node's ranks.
    """

    def __init__(self, run_dir: Path, agent: Path | None, *, since_t: float, ranks: Sequence[int] = ()) -> None:
        self._attempts = run_dir / "attempts"
        self._agent = agent
        self._since_t = since_t
        self._always = frozenset(ranks)
        self._ranks: dict[int, frozenset[int]] = {}
        self._offsets: dict[Path, int] = {}
        self._old: set[Path] = set()
        self._waiting: list[Told] = []
        self.unreadable = 0
        """Lines that were no events."""

    def poll(self) -> tuple[list[Told], bool]:
        """What has come since the last call, in the order of time, and whether there is more to read at once.

        Events of this very moment are kept back for the next call, because an earlier one may be in a file that was
        read before it was written.
        """
        now_t = time.time()
        behind_t = [] if self._agent is None else self._read(0, self._agent)
        wanted = sorted(self._always.union(*self._ranks.values()))
        folders = self._folders() if wanted else []
        for attempt, folder in folders:
            for rank in wanted:
                path = folder / "events" / f"rank_{rank:05d}.jsonl"
                behind_t += self._read(attempt, path, is_newest=attempt == folders[-1][0])
        self._waiting.sort(key=lambda told: told[1].t)
        return self._take(min([now_t, *behind_t]), now_t), bool(behind_t)

    def drain(self) -> list[Told]:
        """All that there is, that of this very moment included."""
        found: list[Told] = []
        more = True
        while more:
            told, more = self.poll()
            found += told
        found += self._take(math.inf, math.inf)
        return found

    def _folders(self) -> list[tuple[int, Path]]:
        """Attempts whose ranks may have written since."""
        try:
            found = [(int(entry.name), Path(entry.path)) for entry in os.scandir(self._attempts) if _is_number(entry)]
        except FileNotFoundError:
            return []
        return sorted(found)

    def _read(self, attempt: int, path: Path, *, is_newest: bool = True) -> list[float]:
        """Read whole lines of a file. If there are more, the time of the last one is returned: up to then it is
        known."""
        if path in self._old:
            return []
        offset = self._offsets.get(path, 0)
        try:
            with path.open("rb") as file:
                if offset == 0 and os.fstat(file.fileno()).st_mtime < self._since_t:
                    if not is_newest:
                        self._old.add(path)
                    return []
                file.seek(offset)
                data = file.read(READ_BYTES)
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        self._offsets[path] = offset + whole
        last_t = self._since_t
        for line in data[:whole].split(b"\n")[:-1]:
            try:
                record = parse_event(line, str(path))
            except DiagnosticsError:
                self.unreadable += 1
                continue
            last_t = record.t
            if record.t >= self._since_t and record.kind not in (GoodputMeasured.kind, *NODE_KINDS):
                self._keep(attempt, record)
        return [last_t] if whole > 0 and len(data) == READ_BYTES else []

    def _keep(self, attempt: int, record: Record) -> None:
        if attempt == 0 and record.kind == "workers_started":
            self._ranks[record.generation] = frozenset(int(rank) for rank in record.fields.get("ranks") or ())
        if attempt == 0 or record.rank in (self._ranks.get(record.generation) or self._always):
            self._waiting.append((attempt, record))

    def _take(self, until_t: float, now_t: float) -> list[Told]:
        found: list[Told] = []
        waiting: list[Told] = []
        for told in self._waiting:
            ready = told[1].t < until_t or told[1].t > now_t + AHEAD_S
            (found if ready else waiting).append(told)
        self._waiting = waiting
        return found


def _is_number(entry: os.DirEntry[str]) -> bool:
    return entry.name.isdecimal() and entry.is_dir(follow_symlinks=False)
