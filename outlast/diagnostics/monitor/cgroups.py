"""The cgroups of a process, of version 1 and 2, and how long its CPU quota held it back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    mounts = [line.split() for line in (mountinfo or "").splitlines()]
    for line in (membership or "").splitlines():
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


def cpu_quotas(pid: int, root: Path = Path("/")) -> dict[Path, CpuQuota]:
    """The cgroups of a process that have a CPU quota, its own and those around it, by their folders."""
    files = SystemFiles(root)
    found: dict[Path, CpuQuota] = {}
    for group in cgroups_of("cpu", pid, root):
        folder = group.folder
        for _ in range(MOST_ANCESTORS):
            if folder not in found and (quota := _quota_at(folder, group, files)) is not None:
                found[folder] = quota
            if folder == group.mount or folder == folder.parent:
                break
            folder = folder.parent
    return found


def _quota_at(folder: Path, group: Cgroup, files: SystemFiles) -> CpuQuota | None:
    """None without a quota, or where the files are not there."""
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
