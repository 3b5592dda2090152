"""Disks that answer late, and networks that lose what is sent."""

from __future__ import annotations

from dataclasses import dataclass

from outlast.diagnostics.monitor.files import SystemFiles, grown

_NO_DISKS = ("loop", "ram", "zram", "sr", "fd")


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Of one disk in one interval."""

    name: str
    done: int
    """Reads and writes that were finished."""
    wait_s: float
    """Mean time that each of them took, in the queue and on the disk."""
    waiting: int
    """Reads and writes that are not finished now."""
    busy_s: float


@dataclass(frozen=True, slots=True)
class NetworkUse:
    """Of this network namespace in one interval."""

    received_bytes: float = 0.0
    sent_bytes: float = 0.0
    errors: float = 0.0
    """Frames with errors, of all interfaces but loopback."""
    with_errors: str = ""
    """The interface with most of them."""
    segments: float = 0.0
    """TCP segments sent."""
    sent_again: float = 0.0
    """... of which this many were sent again, because nobody had confirmed them."""


class Disks:
    """Compares counters of one look with those of the look before.

    Args:
        files: the system's.
    """

    def __init__(self, files: SystemFiles) -> None:
        self._files = files
        self._before: dict[str, tuple[int, int, int, int]] = {}

    def look(self) -> tuple[DiskUse, ...]:
        """What happened since the look before, on each whole disk that is in use."""
        now = {}
        for line in (self._files.text("proc/diskstats", "disks") or "").splitlines():
            words = line.split()
            if len(words) < 14 or words[2].startswith(_NO_DISKS):
                continue
            numbers = [int(word) for word in words[3:14]]
            # reads, their ms, writes, their ms, in flight, busy ms: the same places in every kernel
            now[words[2]] = (numbers[0] + numbers[4], numbers[3] + numbers[7], numbers[8], numbers[9])
        before, self._before = self._before, now
        found = []
        for name, (done, ms, waiting, busy_ms) in now.items():
            if name not in before or not self._is_whole(name):
                continue
            count = max(0, done - before[name][0])
            wait_s = max(0, ms - before[name][1]) / 1e3 / count if count else 0.0
            found.append(DiskUse(name, count, wait_s, waiting, max(0, busy_ms - before[name][3]) / 1e3))
        return tuple(found)

    def _is_whole(self, name: str) -> bool:
        """Not a partition, whose counts are its disk's too."""
        return (self._files.root / "sys/block" / name.replace("/", "!")).exists()


class Network:
    """Compares counters of one look with those of the look before.

    Args:
        files: the system's.
    """

    def __init__(self, files: SystemFiles) -> None:
        self._files = files
        self._before: dict[str, float] | None = None
        self._errors: dict[str, float] = {}

    def look(self) -> NetworkUse:
        """What happened since the look before."""
        now, errors = {"received": 0.0, "sent": 0.0}, {}
        for line in (self._files.text("proc/net/dev", "network") or "").splitlines():
            name, colon, rest = line.partition(":")
            words = rest.split()
            if colon and name.strip() != "lo" and len(words) >= 16:
                now["received"] += int(words[0])
                now["sent"] += int(words[8])
                errors[name.strip()] = float(int(words[2]) + int(words[10]))
        now |= _tcp(self._files.text("proc/net/snmp", "TCP counters") or "")
        before, self._before = self._before, now
        errors_before, self._errors = self._errors, errors
        more = {name: grown(errors_before, errors, name) for name in errors}
        worst = max(more, key=lambda name: more[name], default="")
        return NetworkUse(
            received_bytes=grown(before, now, "received"),
            sent_bytes=grown(before, now, "sent"),
            errors=sum(more.values()),
            with_errors=worst if more.get(worst) else "",
            segments=grown(before, now, "OutSegs"),
            sent_again=grown(before, now, "RetransSegs"),
        )


def _tcp(text: str) -> dict[str, float]:
    """The counters of ``/proc/net/snmp`` for TCP: a line of names, then one of numbers."""
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("Tcp:")]
    if len(lines) < 2:
        return {}
    found = dict(zip(lines[0], lines[1], strict=False))
    return {name: float(found[name]) for name in ("OutSegs", "RetransSegs") if found.get(name, "").isdecimal()}
