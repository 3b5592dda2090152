"""Who uses the cores of this node's ranks: others' share, the ranks' wait for a core, and who the other is."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from outlast.diagnostics.monitor.files import SystemFiles
from outlast.diagnostics.monitor.ranks import RankUse

WORTH_A_LOOK_CORES = 0.25
"""While others use less than this of the ranks' cores, nobody looks who they are, which costs milliseconds."""
WORTH_A_LOOK_SHARE = 0.1
"""... or less than this share."""
MOST_PROCESSES = 4096
MOST_THREADS = 64
"""Of a rank, whose wait for a core is read."""
DEAR_S = 0.02
"""A look at all processes that costs more is not taken again for ``REST_S``."""
REST_S = 10.0
KNOWN_S = 5.0
"""How long the answer of a look holds."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class OtherProcess:
    """A process that is not of this launch, and used the ranks' cores."""

    pid: int
    name: str
    cores: float
    """CPU seconds a second."""


@dataclass(frozen=True, slots=True)
class CoresUse:
    """Of one interval, on a set of cores that ranks run on."""

    cores: int
    others_cores: float = 0.0
    """CPU seconds a second that others used there."""
    stolen_cores: float = 0.0
    """... and that the host of this virtual machine gave to other machines."""
    busy_share: float = 0.0
    """How much of these cores was in use, by whomever."""
    ranks: tuple[int, ...] = ()
    """Those that run on these cores."""
    other: OtherProcess | None = None
    """The process of the others that used most; None if it is not known yet, or lies outside this container."""

    @property
    def is_crowded(self) -> bool:
        """Whether others use enough of the cores to matter."""
        return max(self.others_cores, self.stolen_cores) >= max(WORTH_A_LOOK_CORES, WORTH_A_LOOK_SHARE * self.cores)


class _Process(NamedTuple):
    name: str
    parent: int
    cpu_s: float
    core: int


class Cores:
    """Compares counters of one look with those of the look before.

    Args:
        files: the system's.
        launcher: the process whose descendants are no others.
    """

    def __init__(self, files: SystemFiles, launcher: int) -> None:
        self._files = files
        self._launcher = launcher
        self._busy: dict[int, tuple[float, float]] = {}  # by core: busy and stolen seconds
        self._own_s = 0.0
        self._all: dict[int, _Process] = {}
        self._all_at_s = 0.0
        self._others: dict[frozenset[int], OtherProcess] = {}
        self._rest_until_s = 0.0
        self._delays: dict[int, dict[str, int]] = {}

    def look(self, ranks: Sequence[RankUse], seconds: float) -> tuple[CoresUse, ...]:
        """What happened since the look before, for each set of cores that ranks share.

        Args:
            ranks: this node's.
            seconds: since the look before.
        """
        before, self._busy = self._busy, self._read_busy()
        own_before_s, own_s = self._own_s, time.process_time()
        self._own_s = own_s
        everywhere = frozenset[int]().union(*(one.cores for one in ranks))
        own = [(everywhere, own_s - own_before_s), *((one.cores, one.cpu_s) for one in ranks)]
        sets = list(dict.fromkeys(one.cores for one in ranks))
        uses = [self._use_of(cores, before, own, seconds) for cores in sets] if before and seconds > 0 else []
        crowded = [cores for cores, use in zip(sets, uses, strict=False) if use.is_crowded]
        others = self._who(crowded) if crowded else {}
        if not crowded:
            self._all, self._others = {}, {}
        return tuple(
            replace(use, other=others.get(cores), ranks=tuple(one.rank for one in ranks if one.cores == cores))
            for cores, use in zip(sets, uses, strict=False)
        )

    @staticmethod
    def _own_share(cores: frozenset[int], own: Sequence[tuple[frozenset[int], float]]) -> float:
        """CPU seconds of this launch on some cores, if each process used all of its cores alike."""
        return sum(cpu_s * len(mine & cores) / len(mine) for mine, cpu_s in own if mine)

    def _use_of(
        self,
        cores: frozenset[int],
        before: Mapping[int, tuple[float, float]],
        own: Sequence[tuple[frozenset[int], float]],
        seconds: float,
    ) -> CoresUse:
        known = [core for core in cores if core in before and core in self._busy]
        busy_s = sum(self._busy[core][0] - before[core][0] for core in known)
        stolen_s = sum(self._busy[core][1] - before[core][1] for core in known)
        return CoresUse(
            cores=len(known),
            others_cores=max(0.0, busy_s - self._own_share(cores, own)) / seconds,
            stolen_cores=max(0.0, stolen_s) / seconds,
            busy_share=busy_s / seconds / max(1, len(known)),
        )

    def delayed_s(self, pid: int) -> float | None:
        """Seconds since this was last asked in which the process' slowest thread waited for a core; None: not known."""
        before, now = self._delays.get(pid), {}
        try:
            threads = os.listdir(self._files.root / f"proc/{pid}/task")[:MOST_THREADS]
        except OSError:
            return None
        for thread in threads:
            words = (self._files.text(f"proc/{pid}/task/{thread}/schedstat") or "").split()
            if len(words) >= 2:
                now[thread] = int(words[1])
        self._delays[pid] = now
        if not now:
            self._files.note("wait for a core", f"{self._files.root}/proc/PID/task/TID/schedstat cannot be read")
        if not now or before is None:
            return None
        return max((delay - before[one] for one, delay in now.items() if one in before), default=0) / 1e9

    def forget(self, pid: int) -> None:
        """The waits of a process so far are not asked for: the next answer would span more than an interval."""
        self._delays.pop(pid, None)

    def _read_busy(self) -> dict[int, tuple[float, float]]:
        """Per core: seconds in user, nice, system, irq and softirq; and stolen ones."""
        found = {}
        for line in (self._files.text("proc/stat", "use of the cores") or "").splitlines():
            words = line.split()
            if words and words[0].startswith("cpu") and words[0][3:].isdecimal():
                numbers = [int(word) / _TICKS for word in words[1:9]] + [0.0] * 8
                user, nice, system, _, _, irq, softirq, stolen = numbers[:8]
                found[int(words[0][3:])] = (user + nice + system + irq + softirq, stolen)
        return found

    def _who(self, crowded: Sequence[frozenset[int]]) -> dict[frozenset[int], OtherProcess]:
        """By set of cores, the process that used most there since the last time, and is not the launcher's."""
        began_s = time.monotonic()
        if began_s < self._rest_until_s:
            return self._others
        cpu_s = time.thread_time()
        before, seconds = self._all, began_s - self._all_at_s
        self._all, self._all_at_s = self._read_all(), began_s
        if time.thread_time() - cpu_s > DEAR_S:
            self._rest_until_s = began_s + REST_S
        found = {}
        if before and seconds > 0:
            self._rest_until_s = max(self._rest_until_s, began_s + KNOWN_S)
        for cores in crowded if before and seconds > 0 else ():
            used = [
                (one.cpu_s - before[pid].cpu_s, pid)
                for pid, one in self._all.items()
                if pid in before and one.core in cores and not self._is_own(pid)
            ]
            most_s, pid = max(used, default=(0.0, 0))
            if most_s / seconds >= WORTH_A_LOOK_CORES / 2:
                found[cores] = OtherProcess(pid, self._all[pid].name, most_s / seconds)
        self._others = found
        return found

    def _is_own(self, pid: int) -> bool:
        for _ in range(64):
            if pid == self._launcher:
                return True
            one = self._all.get(pid)
            if one is None:
                return False
            pid = one.parent
        return False

    def _read_all(self) -> dict[int, _Process]:
        found = {}
        pids = [name for name in os.listdir(self._files.root / "proc") if name.isdecimal()][:MOST_PROCESSES]
        for pid in pids:
            text = self._files.text(f"proc/{pid}/stat")
            if text is None:
                continue
            name, rest = text[text.find("(") + 1 : text.rfind(")")], text[text.rfind(")") + 2 :].split()
            if len(rest) > 36:
                found[int(pid)] = _Process(name, int(rest[1]), (int(rest[11]) + int(rest[12])) / _TICKS, int(rest[36]))
        return found
