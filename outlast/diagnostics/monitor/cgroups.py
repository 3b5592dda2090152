"""The cgroups of a process, of version 1 and 2, and how long its CPU quota held it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from outlast.diagnostics.monitor.files import SystemFiles, counters

MOST_ANCESTORS = 16
"""A cgroup deeper than this is looked at from the process up to here."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A place in a hierarchy of cgroups."""

    name: str
    """As ``/proc/PID/cgroup`` has it."""
    folder: Path
    mount: Path
    """Where the hierarchy begins; in a container perhaps the container's own group."""
    version: int


def cgroups_of(controller: str, pid: int | str = "self", root: Path = Path("/")) -> Iterator[Cgroup]:
    """Where a controller's files of a process may be, likeliest first; whether they are there is not looked at.

    Args:
        controller: of version 1, e.g. ``memory``; version 2 has one hierarchy for all.
        pid: the process.
        root: where ``proc`` and ``sys`` are.
    """
    files = SystemFiles(root)
    mountinfo, membership = files.text("proc/self/mountinfo"), files.text(f"proc/{pid}/cgroup")
    return _places(controller, mountinfo or "", membership or "", root)


def _places(controller: str, mountinfo: str, membership: str, root: Path) -> Iterator[Cgroup]:
    """As :func:`cgroups_of`, of what ``/proc/self/mountinfo`` and ``/proc/PID/cgroup`` hold."""
    mounts = [line.split() for line in mountinfo.splitlines()]
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        for fields in mounts:
            kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
            if kind != ("cgroup" if version == 1 else "cgroup2") or (version == 1 and controller not in options):
                continue
            mount = root / fields[4].lstrip("/")
            # In a container the mount may begin at the container's own cgroup.
            below = path.removeprefix(fields[3]) if fields[3] != "/" else path
            yield Cgroup(path, mount / below.lstrip("/"), mount, version)
            yield Cgroup(path, mount, mount, version)


@dataclass(frozen=True, slots=True)
class CpuQuota:
    """Counters of one cgroup with a CPU quota, since it was made."""

    name: str
    cores: float
    """The quota: cores that its processes may use together."""
    periods: int
    throttled_periods: int
    throttled_s: float
    """Summed over the CPUs that were held back."""

    def held_back_s(self, since: CpuQuota, seconds: float) -> float:
        """Of the last ``seconds``, how many it was throttled for, as wall time: at most the share of its periods."""
        periods = self.periods - since.periods
        if periods <= 0:
            return 0.0
        share = (self.throttled_periods - since.throttled_periods) / periods
        return min(self.throttled_s - since.throttled_s, share * seconds)


class CpuQuotas:
    """The CPU quotas that hold for processes. Most processes of a node are in the same cgroup, which is read once.

    Args:
        root: where ``proc`` and ``sys`` are.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._files = SystemFiles(root)
        self._mountinfo = self._files.text("proc/self/mountinfo") or ""
        self._places: dict[str, tuple[Cgroup, ...]] = {}

    def of(self, ranks: Mapping[int, int]) -> dict[Path, tuple[CpuQuota, tuple[int, ...]]]:
        """The cgroups with a quota, those of these processes and those around them, by their folders.

        Args:
            ranks: process id of each rank; with a quota come the ranks inside.
        """
        inside: dict[str, list[int]] = {}
        for rank, pid in ranks.items():
            inside.setdefault(self._files.text(f"proc/{pid}/cgroup") or "", []).append(rank)
        self._places = {text: self._places.get(text) or self._find(text) for text in inside}
        found: dict[Path, tuple[CpuQuota, tuple[int, ...]]] = {}
        for text, members in inside.items():
            for place in self._places[text]:
                if place.folder in found:
                    quota, others = found[place.folder]
                    found[place.folder] = quota, (*others, *members)
                elif (read := _quota_at(place, self._files)) is not None:
                    found[place.folder] = read, tuple(members)
        return found

    def _find(self, membership: str) -> tuple[Cgroup, ...]:
        """The folders of these cgroups and of those around them, each once."""
        found: dict[Path, Cgroup] = {}
        for group in _places("cpu", self._mountinfo, membership, self._files.root):
            folder = group.folder
            for _ in range(MOST_ANCESTORS):
                found.setdefault(folder, replace(group, folder=folder))
                if folder == group.mount or folder == folder.parent:
                    break
                folder = folder.parent
        return tuple(one for one in found.values() if (one.folder / "cpu.stat").exists())


def _quota_at(group: Cgroup, files: SystemFiles) -> CpuQuota | None:
    """None without a quota, or where the files are not there."""
    folder = group.folder
    if group.version == 1:
        limit, period = files.text(folder / "cpu.cfs_quota_us"), files.text(folder / "cpu.cfs_period_us")
    else:
        limit, _, period = (files.text(folder / "cpu.max") or "max").partition(" ")
    stat = files.text(folder / "cpu.stat") if limit and limit.strip().isdecimal() else None  # "max" and -1: no quota
    if stat is None or not period or not limit:
        return None
    counts = counters(stat)
    if not {"nr_periods", "nr_throttled"} <= counts.keys():
        return None
    throttled_s = counts.get("throttled_time", 0) / 1e9 + counts.get("throttled_usec", 0) / 1e6
    name = "/" + str(folder.relative_to(group.mount)) if folder != group.mount else group.name
    return CpuQuota(name, int(limit) / int(period), counts["nr_periods"], counts["nr_throttled"], throttled_s)
