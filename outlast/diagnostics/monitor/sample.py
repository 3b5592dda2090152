"""One look at a node: everything that is compared, in one record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from outlast.diagnostics.monitor.cgroups import CpuQuota, CpuQuotas
from outlast.diagnostics.monitor.clock import ClockJumps, ClockUse
from outlast.diagnostics.monitor.cores import Cores, CoresUse
from outlast.diagnostics.monitor.devices import Disks, DiskUse, Network, NetworkUse
from outlast.diagnostics.monitor.files import SystemFiles
from outlast.diagnostics.monitor.hardware import Hardware, HardwareUse, KernelLog
from outlast.diagnostics.monitor.memory import Memory, MemoryUse, Pressure, Stalls
from outlast.diagnostics.monitor.ranks import Ranks, RankUse

HARDWARE_EVERY_S = 10.0
"""Heat and memory errors have hundreds of files on a large node."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Throttle:
    """What a cgroup's CPU quota did in one interval."""

    folder: str
    name: str
    cores: float
    held_back_s: float
    ranks: tuple[int, ...]
    """Those inside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What happened on this node in one interval."""

    t: float
    """Seconds since the epoch, at its end."""
    seconds: float
    """Its length; 0 of the first one, which has nothing to compare with."""
    ranks: tuple[RankUse, ...] = ()
    cores: tuple[CoresUse, ...] = ()
    """For each set of cores that ranks share."""
    throttles: tuple[Throttle, ...] = ()
    memory: MemoryUse = field(default_factory=MemoryUse)
    memory_stalls: Stalls = field(default_factory=Stalls)
    io_stalls: Stalls = field(default_factory=Stalls)
    cpu_stalls: Stalls = field(default_factory=Stalls)
    disks: tuple[DiskUse, ...] = ()
    network: NetworkUse = field(default_factory=NetworkUse)
    hardware: HardwareUse = field(default_factory=HardwareUse)
    kernel_lines: tuple[str, ...] = ()
    clock: ClockUse = field(default_factory=ClockUse)


class Sampler:
    """Takes samples of one node. What cannot be read is left out, and named in :attr:`absent`.

    Args:
        shm_dir: of the run's heartbeats and rings; None without.
        interval_s: between two samples.
        quiet_s: a rank that is silent for longer has its ring read.
        root: where ``proc``, ``sys`` and ``dev`` are.
    """

    def __init__(
        self, shm_dir: Path | None, *, interval_s: float = 1.0, quiet_s: float = 8.0, root: Path = Path("/")
    ) -> None:
        self._files = SystemFiles(root)
        self._quiet_s = quiet_s
        self._clock = ClockJumps(interval_s)
        self._ranks = Ranks(shm_dir)
        self._cores = Cores(self._files, os.getpid())
        self._memory = Memory(self._files)
        self._pressures = {name: Pressure(self._files, name) for name in ("cpu", "memory", "io")}
        self._disks = Disks(self._files)
        self._network = Network(self._files)
        self._hardware = Hardware(self._files)
        self._hardware_at_s = 0.0
        self._kernel_log = KernelLog(self._files)
        self._cpu_quotas = CpuQuotas(root)
        self._quotas: dict[Path, CpuQuota] = {}
        self._last_s: float | None = None

    @property
    def absent(self) -> dict[str, str]:
        """By kind, why it is not seen on this node."""
        return dict(self._files.absent)

    def expect(self, interval_s: float) -> None:
        """The next samples come at another interval."""
        self._clock.interval_s = interval_s

    def look(self, pids: Mapping[int, int], since_s: float = 0.0) -> Sample:
        """One sample.

        Args:
            pids: by rank, the process that was started for it.
            since_s: when, CLOCK_MONOTONIC seconds.
        """
        now_s = time.monotonic()
        seconds = now_s - self._last_s if self._last_s is not None else 0.0
        self._last_s = now_s
        clock = self._part("clock", self._clock.tick, ClockUse())
        nobody: tuple[RankUse, ...] = ()
        ranks = self._part("ranks", lambda: self._ranks.look(pids, now_s, self._quiet_s, since_s), nobody)
        cores = frozenset[int]().union(*(one.cores for one in ranks))
        unused: tuple[CoresUse, ...] = ()
        uses = self._part("use of the cores", lambda: self._cores.look(ranks, seconds), unused)
        return Sample(
            t=time.time(),
            seconds=seconds,
            ranks=self._part("wait for a core", lambda: self._with_delays(ranks, uses), ranks),
            cores=uses,
            throttles=self._part("CPU quota", lambda: self._look_at_quotas(ranks, seconds), ()),
            memory=self._part("memory", self._memory.look, MemoryUse()),
            memory_stalls=self._part("pressure", self._pressures["memory"].look, Stalls()),
            io_stalls=self._part("pressure", self._pressures["io"].look, Stalls()),
            cpu_stalls=self._part("pressure", self._pressures["cpu"].look, Stalls()),
            disks=self._part("disks", self._disks.look, ()),
            network=self._part("network", self._network.look, NetworkUse()),
            hardware=self._part("heat", lambda: self._look_at_hardware(cores, now_s), HardwareUse()),
            kernel_lines=self._part("kernel log", self._kernel_log.look, ()),
            clock=clock,
        )

    def close(self) -> None:
        """Close what is open."""
        self._kernel_log.close()

    def _part(self, kind: str, look: Callable[[], _T], nothing: _T) -> _T:
        """What a part sees; a file in a format that nobody knows costs that part, not the others."""
        try:
            return look()
        except (OSError, ValueError, LookupError) as error:
            self._files.note(kind, f"not understood: {type(error).__name__}: {error}")
            return nothing

    def _with_delays(self, ranks: tuple[RankUse, ...], uses: tuple[CoresUse, ...]) -> tuple[RankUse, ...]:
        """How long ranks waited for a core; not asked while nobody else wants theirs."""
        crowded = {rank for use in uses if use.is_crowded for rank in use.ranks}
        for one in ranks:
            if one.rank not in crowded:
                self._cores.forget(one.pid)
        return tuple(
            replace(one, delayed_s=self._cores.delayed_s(one.pid)) if one.rank in crowded else one for one in ranks
        )

    def _look_at_quotas(self, ranks: tuple[RankUse, ...], seconds: float) -> tuple[Throttle, ...]:
        now = self._cpu_quotas.of({one.rank: one.pid for one in ranks})
        before, self._quotas = self._quotas, {folder: quota for folder, (quota, _) in now.items()}
        return tuple(
            Throttle(str(folder), quota.name, quota.cores, quota.held_back_s(before[folder], seconds), inside)
            for folder, (quota, inside) in now.items()
            if folder in before
        )

    def _look_at_hardware(self, cores: frozenset[int], now_s: float) -> HardwareUse:
        if now_s - self._hardware_at_s < HARDWARE_EVERY_S:
            return HardwareUse()
        self._hardware_at_s = now_s
        return self._hardware.look(cores)
