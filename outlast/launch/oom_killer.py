"""Whether the kernel's OOM killer was at work: it ends a process with SIGKILL, which says nothing of memory."""

from __future__ import annotations

from pathlib import Path

from outlast.diagnostics.monitor import find_memory_cgroup

_VMSTAT = "proc/vmstat"


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


def _count(file: Path) -> int:
    """The number after ``oom_kill``; 0 if the file cannot be read or has none."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _processes(count: int) -> str:
    return "a process" if count == 1 else f"{count} processes"
