"""How much memory a process takes for itself, and how much there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from outlast.diagnostics.monitor.cgroups import MOST_ANCESTORS, Cgroup, cgroups_of

_NO_LIMIT_BYTES = 1 << 60
"""From here on a limit of a cgroup of version 1 is none."""


def taken_bytes(pid: int) -> int | None:
    """What a process takes: its own pages, and its part of those that it shares (PSS); None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in text.splitlines()[1:] if ":" in line)
    return int(lines["Pss"].split()[0]) << 10 if "Pss" in lines else None


def free_bytes() -> int | None:
    """What can be had before this machine, or a cgroup of this process, is short of memory; None if nothing tells."""
    found = []
    try:
        info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    except OSError:
        info = {}
    if "MemAvailable" in info:
        found.append(int(info["MemAvailable"].split()[0]) << 10)
    for group in cgroups_of("memory"):
        found += [one for folder in _folders(group) if (one := _left_bytes(folder, group.version)) is not None]
    return min(found, default=None)


def _folders(group: Cgroup) -> Iterator[Path]:
    folder = group.folder
    for _ in range(MOST_ANCESTORS):
        yield folder
        if folder in (group.mount, folder.parent):
            return
        folder = folder.parent


def _left_bytes(folder: Path, version: int) -> int | None:
    """The limit, less what is used and is no cache that can be dropped."""
    limit, used = ("memory.max", "memory.current") if version == 2 else _VERSION_1
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        if not most.isdecimal() or int(most) >= _NO_LIMIT_BYTES:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cache = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
    return max(0, int(most) - now + cache)


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
