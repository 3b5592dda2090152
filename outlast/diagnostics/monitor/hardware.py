"""What hardware says of itself: processors slowed by heat, memory errors (ECC), and the kernel's log."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from outlast.diagnostics.monitor.files import SystemFiles, grown
from outlast.plain_text import plain_text

MOST_RECORDS = 200
"""Of the kernel's log, in one look; what is left waits for the next one."""
MOST_CHARS = 200
_RECORD_BYTES = 8192
MATTERS = re.compile(
    r"out of memory|oom-kill|hardware error|machine check|\bmce:|\bedac\b|nvrm: xid|soft lockup|hard lockup|"
    r"blocked for more than \d+ seconds|rcu.*\bstall|i/o error|ext4-fs error|xfs.*(?:corrupt|shut)|"
    r"nfs: server .* not responding|link is (?:down|not ready)|nic link is down|pcie bus error|aer: .*error|"
    r"throttled|gpu has fallen off the bus|segfault at",
    re.IGNORECASE,
)
"""Lines of the kernel's log that are worth telling."""


@dataclass(frozen=True, slots=True)
class HardwareUse:
    """Since the look before."""

    heat_throttles: float = 0.0
    """How often a core of the ranks, or its package, was slowed because it was too hot."""
    speed_share: float = 0.0
    """Of full speed, how fast the slowest of these cores is now, if one was slowed; 0 if that is not known."""
    corrected: float = 0.0
    """Memory errors that ECC has corrected."""
    uncorrected: float = 0.0


class Hardware:
    """Compares counters of one look with those of the look before.

    Args:
        files: the system's.
    """

    def __init__(self, files: SystemFiles) -> None:
        self._files = files
        self._before: dict[str, float] | None = None

    def look(self, cores: frozenset[int]) -> HardwareUse:
        """What happened since the look before to the machine, and to these cores."""
        now: dict[str, float] = {}
        heat = [
            (f"heat{core}{what}", f"sys/devices/system/cpu/cpu{core}/thermal_throttle/{what}_throttle_count")
            for core in sorted(cores)
            for what in ("core", "package")
        ]
        for name, path in heat:
            now |= self._count(name, self._files.text(path, "heat"))
        controllers = self._files.glob("sys/devices/system/edac/mc/mc[0-9]*")
        if not controllers:
            self._files.note("memory errors (ECC)", f"{self._files.root / 'sys/devices/system/edac/mc'}: no controller")
        for folder in controllers:
            for what in ("ce_count", "ue_count"):
                now |= self._count(f"{what}{folder.name}", self._files.text(folder / what, "memory errors (ECC)"))
        before, self._before = self._before, now

        def more(prefix: str) -> float:
            return sum(grown(before, now, name) for name in now if name.startswith(prefix))

        heat_throttles = more("heat")
        speed = self._speed_share(cores) if heat_throttles else 0.0
        return HardwareUse(heat_throttles, speed, more("ce_count"), more("ue_count"))

    def _speed_share(self, cores: frozenset[int]) -> float:
        shares = []
        for core in cores:
            folder = f"sys/devices/system/cpu/cpu{core}/cpufreq"
            now, full = (self._files.text(f"{folder}/{name}") for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
            if now and full and now.strip().isdecimal() and full.strip().isdecimal():
                shares.append(int(now) / int(full))
        return min(shares, default=0.0)

    @staticmethod
    def _count(name: str, text: str | None) -> dict[str, float]:
        return {name: float(text)} if text is not None and text.strip().isdecimal() else {}


class KernelLog:
    """Lines of ``/dev/kmsg`` that matter, from when this was made. Needs the right to read it.

    Args:
        files: the system's.
    """

    def __init__(self, files: SystemFiles) -> None:
        self._fd: int | None = None
        path = files.root / "dev/kmsg"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            files.note("kernel log", f"{path}: {error.strerror}")
            self.close()

    def look(self) -> tuple[str, ...]:
        """New lines that matter, oldest first; at most ``MOST_RECORDS`` records are read."""
        found = []
        for _ in range(MOST_RECORDS if self._fd is not None else 0):
            assert self._fd is not None
            try:
                record = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                break
            except BrokenPipeError:  # records were overwritten before they were read; the next read goes on after them
                continue
            if not record:
                break
            text = record.decode(errors="replace").partition(";")[2].partition("\n")[0]
            if MATTERS.search(text):
                found.append(plain_text(text)[:MOST_CHARS])
        return tuple(found)

    def close(self) -> None:
        """Close the log; closing twice is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
