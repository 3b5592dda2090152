"""Whether the kernel's OOM killer was at work: it ends a process with SIGKILL, which says nothing of memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_VMSTAT = "proc/vmstat"
_NO_LIMIT_BYTES = 1 << 60
"""Version 1 of cgroups writes a number of about 2^63 where there is no limit."""


@dataclass(frozen=True)
class MemoryCgroup:
    """The memory cgroup of this process: a group of processes that share a limit."""

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


class OomKills:
    """Counts from when it was made what the OOM killer does, in this process's cgroup and on the whole machine.

    A rank, and what it starts, is in its launcher's cgroup unless somebody moves it.

    Args:
        root: where ``proc`` and ``sys`` are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._vmstat = root / _VMSTAT
        self._cgroup = find_memory_cgroup(root)
        self._before = self._counts()

    def describe(self, signal_killed: bool) -> str:
        """One clause if the OOM killer may have ended a process of this launcher; else empty.

        Args:
            signal_killed: whether the process in question died of SIGKILL. If not, a child of it may have, so that only
                this cgroup's count matters, not the machine's.
        """
        group, machine = (now - before for now, before in zip(self._counts(), self._before, strict=True))
        if group > 0:
            assert self._cgroup is not None
            limit_bytes = self._cgroup.limit_bytes()
            limit = f", limit {limit_bytes / 1e9:.2f} GB" if limit_bytes is not None else ""
            return f"out of memory: the kernel killed {_processes(group)} of memory cgroup {self._cgroup.name}{limit}"
        if machine > 0 and signal_killed:
            return f"probably out of memory: since the start, the kernel killed {_processes(machine)} of this machine"
        return ""

    def _counts(self) -> tuple[int, int]:
        group = _count(self._cgroup.counter) if self._cgroup is not None else 0
        return group, _count(self._vmstat)


def find_memory_cgroup(root: Path = Path("/")) -> MemoryCgroup | None:
    """The memory cgroup of this process, of version 2 or 1; None if there is none, or it cannot be seen.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    try:
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
        memberships = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in memberships:
        if "memory" not in controllers.split(",") and controllers:
            continue
        version = 1 if controllers else 2
        counter, limit = [("memory.oom_control", "memory.limit_in_bytes"), ("memory.events", "memory.max")][version - 1]
        for fields in mounts:
            kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
            if kind != ("cgroup" if version == 1 else "cgroup2") or (version == 1 and "memory" not in options):
                continue
            mount = root / fields[4].lstrip("/")
            # In a container the mount may begin at the container's own cgroup.
            below = path.removeprefix(fields[3]) if fields[3] != "/" else path
            for folder in (mount / below.lstrip("/"), mount):
                if (folder / counter).exists():
                    return MemoryCgroup(path, folder / counter, folder / limit)
    return None


def _count(file: Path) -> int:
    """The number after ``oom_kill``; 0 if the file cannot be read or has none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _processes(count: int) -> str:
    return "a process" if count == 1 else f"{count} processes"
