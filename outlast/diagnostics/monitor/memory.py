"""Whether memory is short: swapping, stalls (PSI, ``/proc/pressure``), direct reclaim, the OOM killer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from outlast.diagnostics.monitor.cgroups import cgroups_of
from outlast.diagnostics.monitor.files import SystemFiles, counters, grown

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_NO_LIMIT_BYTES = 1 << 60
"""Version 1 of cgroups writes a number of about 2^63 where there is no limit."""


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """The memory cgroup of a process: a group of processes that share a limit."""

    name: str
    counter: Path
    """Its file with a line ``oom_kill N``."""
    limit: Path
    """Its file with the limit in bytes."""

    def limit_bytes(self) -> int | None:
        """Its limit; None if it has none, or it cannot be read."""
        try:
            text = self.limit.read_text().strip()
        except OSError:
            return None
        return int(text) if text.isdecimal() and int(text) < _NO_LIMIT_BYTES else None


def find_memory_cgroup(root: Path = Path("/")) -> MemoryCgroup | None:
    """The memory cgroup of this process, of version 2 or 1; None if there is none, or it cannot be seen.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    for group in cgroups_of("memory", root=root):
        names = (
            ("memory.oom_control", "memory.limit_in_bytes") if group.version == 1 else ("memory.events", "memory.max")
        )
        counter, limit = (group.folder / name for name in names)
        if counter.exists():
            return MemoryCgroup(group.name, counter, limit)
    return None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of one interval."""

    available_bytes: int | None = None
    swap_used_bytes: int | None = None
    swapped_in_bytes: float = 0.0
    swapped_out_bytes: float = 0.0
    direct_reclaims: float = 0.0
    """How often a process had to free memory itself before it got any."""
    oom_kills: int = 0
    """Processes that the OOM killer ended, in this process' cgroup or, if it counts none, on the whole machine."""
    oom_in_group: bool = False


@dataclass(frozen=True, slots=True)
class Stalls:
    """Seconds of one interval in which processes stood still for want of something (PSI); None where it is not told."""

    some_s: float | None = None
    """At least one process did."""
    full_s: float | None = None
    """All that were not idle did."""


class Memory:
    """Compares counters of one look with those of the look before.

    Args:
        files: the system's.
    """

    def __init__(self, files: SystemFiles) -> None:
        self._files = files
        self._group = find_memory_cgroup(files.root)
        if self._group is None:
            files.note("memory cgroup", "none is mounted")
        self._before: dict[str, int] | None = None
        self._group_kills: int | None = None

    def look(self) -> MemoryUse:
        """What happened since the look before."""
        now = counters(self._files.text("proc/vmstat", "swap and reclaim") or "")
        info = {
            line.partition(":")[0]: int(words[1]) << 10
            for line in (self._files.text("proc/meminfo", "memory") or "").splitlines()
            if len(words := line.split()) > 1 and words[1].isdecimal()
        }
        before, self._before = self._before, now
        group_before, self._group_kills = self._group_kills, self._count_group()
        group = max(0, (self._group_kills or 0) - group_before) if group_before is not None else 0
        machine = int(grown(before, now, "oom_kill"))
        swap = info["SwapTotal"] - info["SwapFree"] if {"SwapTotal", "SwapFree"} <= info.keys() else None
        return MemoryUse(
            available_bytes=info.get("MemAvailable"),
            swap_used_bytes=swap,
            swapped_in_bytes=grown(before, now, "pswpin") * _PAGE_BYTES,
            swapped_out_bytes=grown(before, now, "pswpout") * _PAGE_BYTES,
            direct_reclaims=sum(grown(before, now, name) for name in now if name.startswith("allocstall")),
            oom_kills=group or machine,
            oom_in_group=group > 0,
        )

    @property
    def group_name(self) -> str:
        """Of the memory cgroup of this process; empty without one."""
        return self._group.name if self._group is not None else ""

    def _count_group(self) -> int | None:
        if self._group is None:
            return None
        text = self._files.text(self._group.counter, "OOM kills of the cgroup")
        return None if text is None else counters(text).get("oom_kill", 0)


class Pressure:
    """What ``/proc/pressure`` tells of one resource.

    Args:
        files: the system's.
        resource: ``cpu``, ``memory`` or ``io``.
    """

    def __init__(self, files: SystemFiles, resource: str) -> None:
        self._files = files
        self._path = f"proc/pressure/{resource}"
        self._before: dict[str, float] | None = None

    def look(self) -> Stalls:
        """What happened since the look before; ``full`` of the CPU is missing before Linux 5.13."""
        text = self._files.text(self._path, "pressure")
        if text is None:
            return Stalls()
        now = {}
        for line in text.splitlines():
            which, *words = line.split() or [""]
            for word in words:
                name, _, value = word.partition("=")
                if name == "total" and value.isdecimal():
                    now[which] = int(value) / 1e6
        before, self._before = self._before, now
        if before is None:
            return Stalls()
        return Stalls(*(grown(before, now, name) if name in now else None for name in ("some", "full")))
