"""What a sample shows that can make training slow: pure functions of one sample, each for one cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil

from outlast.diagnostics.monitor.cores import CoresUse
from outlast.diagnostics.monitor.ranks import BUSY_SHARE, RankUse
from outlast.diagnostics.monitor.sample import Sample

THROTTLED_SHARE = 0.1
"""Of the time, from which on a CPU quota matters."""
DELAYED_SHARE = 0.2
"""... and a rank's wait for a core."""
FULL_SHARE = 0.9
"""Cores are all taken beyond this; counts where the kernel tells no waits."""
STALLED_SHARE = 0.1
"""... and stalls for want of memory."""
SWAP_BYTES_PER_S = 1 << 20
RECLAIMS_PER_S = 10.0
"""Where the kernel tells no pressure."""
DISK_WAIT_S = 0.2
"""Mean time of a read or write from which on a disk is slow."""
DISK_LEAST = 4
"""Reads and writes that make a mean."""
SENT_AGAIN_SHARE = 0.02
SENT_AGAIN_LEAST = 10.0
SLOW_PHASES = ("setup", "eval", "data", "checkpoint", "finish", "program")
"""In these a rank may compute for long without a heartbeat."""
SILENT_STEPS = 4.0
"""... as in this many median steps."""
UNSEEN = "processes that are not seen from here, or lived too shortly,"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that one sample shows."""

    what: str
    """Its kind, such as ``cpu_throttled``."""
    words: str
    """A clause of which the node is the subject, in the past tense."""
    key: str = ""
    """Tells two of a kind apart."""
    ranks: tuple[int, ...] = ()
    """Ranks that it concerns; empty for all of the node."""
    value: float = 0.0
    """How much: for kinds that are facts too, in the unit of :data:`outlast.diagnostics.syndromes.facts.UNITS`."""
    measured_s: float | None = None
    """Seconds of the interval in which it held; None if it cannot be measured."""
    at_once: bool = False
    """One sample is enough."""
    lasts: bool = True
    """False for an event that has happened, and is over."""


def find(sample: Sample) -> list[Finding]:
    """Everything that a sample shows, in the order of how directly it holds up a rank."""
    if sample.seconds <= 0:
        return []
    return [finding for rule in RULES for finding in rule(sample)]


def _stopped(sample: Sample) -> Iterator[Finding]:
    for one in sample.ranks:
        if one.state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            by = "a tracer" if one.state == psutil.STATUS_TRACING_STOP else "a signal"
            yield Finding(
                what="stopped",
                words=f"rank {one.rank} (pid {one.pid}) was stopped by {by} (state T)",
                key=str(one.rank),
                ranks=(one.rank,),
                measured_s=sample.seconds,
                at_once=True,
            )


def _throttled(sample: Sample) -> Iterator[Finding]:
    for one in sample.throttles:
        if one.held_back_s >= THROTTLED_SHARE * sample.seconds:
            yield Finding(
                what="cpu_throttled",
                words=f"its cgroup {one.name} was throttled (CPU quota of {one.cores:g} cores)",
                key=one.folder,
                value=one.held_back_s / sample.seconds,
                ranks=one.ranks,
                measured_s=one.held_back_s,
            )


def _busy_neighbour(sample: Sample) -> Iterator[Finding]:
    for use in sample.cores:
        waiting = [one for one in sample.ranks if one.rank in use.ranks and _waits_for_core(one, use, sample)]
        if not use.is_crowded or not waiting:
            continue
        ranks = tuple(one.rank for one in waiting)
        where = f"of the {use.cores} cores" if use.cores > 1 else "of the core"
        whose = f"that rank{'s' if len(use.ranks) > 1 else ''} {', '.join(map(str, use.ranks[:8]))} run"
        whose += "" if len(use.ranks) > 1 else "s"
        if use.stolen_cores > use.others_cores:
            words = f"the host of this virtual machine took {use.stolen_cores:.1f} {where} {whose} on (steal)"
        else:
            who = f"{use.other.name} (pid {use.other.pid})" if use.other is not None else UNSEEN
            words = f"{who} used {use.others_cores:.1f} {where} {whose} on"
        yield Finding(
            what="busy_neighbour",
            words=words,
            key=str(min(use.ranks)),
            ranks=ranks,
            value=max(use.others_cores, use.stolen_cores),
            measured_s=max((one.delayed_s or 0.0 for one in waiting), default=0.0) or None,
        )


def _waits_for_core(one: RankUse, use: CoresUse, sample: Sample) -> bool:
    """Beyond what its quota holds it back, which the kernel counts as waiting too."""
    if one.delayed_s is None:
        return use.busy_share + use.stolen_cores / max(1, use.cores) >= FULL_SHARE
    held_back_s = max((quota.held_back_s for quota in sample.throttles if one.rank in quota.ranks), default=0.0)
    if use.stolen_cores > use.others_cores:  # no wait that this kernel sees
        return True
    return one.delayed_s - held_back_s >= DELAYED_SHARE * sample.seconds


def _swapping(sample: Sample) -> Iterator[Finding]:
    moved = (sample.memory.swapped_in_bytes + sample.memory.swapped_out_bytes) / sample.seconds
    if moved >= SWAP_BYTES_PER_S:
        used = sample.memory.swap_used_bytes
        in_use = f", {used / 1e9:.2f} GB in use" if used is not None else ""
        yield Finding(
            what="swap", words=f"it swapped ({moved / 1e6:.1f} MB/s{in_use})", value=sample.memory.swapped_in_bytes
        )


def _memory_short(sample: Sample) -> Iterator[Finding]:
    stalled_s = sample.memory_stalls.some_s
    short = (
        stalled_s >= STALLED_SHARE * sample.seconds
        if stalled_s is not None
        else sample.memory.direct_reclaims >= RECLAIMS_PER_S * sample.seconds
    )
    if short:
        free = sample.memory.available_bytes
        left = f" ({free / 1e9:.2f} GB available)" if free is not None else ""
        share = (stalled_s or 0.0) / sample.seconds
        words = f"its processes waited for memory{left}"
        yield Finding(what="memory_pressure", words=words, value=share, measured_s=stalled_s)


def _disk_slow(sample: Sample) -> Iterator[Finding]:
    for disk in sample.disks:
        stuck = disk.done == 0 and disk.waiting > 0 and disk.busy_s >= FULL_SHARE * sample.seconds
        if stuck or (disk.done >= DISK_LEAST and disk.wait_s >= DISK_WAIT_S):
            how = (
                f"finished nothing, with {disk.waiting} reads and writes waiting"
                if stuck
                else f"took {disk.wait_s * 1e3:.0f} ms for a read or write"
            )
            yield Finding(
                what="disk_slow",
                words=f"its disk {disk.name} {how}",
                key=disk.name,
                value=disk.wait_s,
                measured_s=min(disk.busy_s, sample.seconds),
            )


def _blocked(sample: Sample) -> Iterator[Finding]:
    for one in sample.ranks:
        if one.state == psutil.STATUS_DISK_SLEEP:
            yield Finding(
                what="io_pressure",
                words=f"rank {one.rank} was in an uninterruptible sleep (state D): a disk or a network file system",
                key=str(one.rank),
                ranks=(one.rank,),
                value=(sample.io_stalls.some_s or 0.0) / sample.seconds,
            )


def _gil_held(sample: Sample) -> Iterator[Finding]:
    for one in sample.ranks:
        if (
            one.inside_collective is False
            and one.phase not in SLOW_PHASES
            and one.silent_s > SILENT_STEPS * one.median_step_s
            and sample.clock.late_s == 0  # nobody looked, so nobody is judged
            and one.cpu_s >= BUSY_SHARE * sample.seconds
        ):
            yield Finding(
                what="gil_held",
                words=(
                    f"rank {one.rank} computed in step {one.step} without a heartbeat, outside any collective: a long "
                    "loop, a compilation, or a thread that holds the GIL"
                ),
                key=str(one.rank),
                ranks=(one.rank,),
                value=min(one.cpu_s, sample.seconds),
                measured_s=min(one.cpu_s, sample.seconds),
            )


def _network(sample: Sample) -> Iterator[Finding]:
    net = sample.network
    if net.sent_again >= SENT_AGAIN_LEAST and net.sent_again >= SENT_AGAIN_SHARE * net.segments:
        yield Finding(
            what="network_errors",
            words=f"TCP sent {net.sent_again:.0f} of {net.segments:.0f} segments again: its network lost or held them",
            value=net.sent_again,
            key="tcp",
        )
    if net.errors > 0:
        yield Finding(
            what="network_errors",
            words=f"its network interface {net.with_errors} counted frames with errors",
            value=net.errors,
            key=net.with_errors,
        )


def _hardware(sample: Sample) -> Iterator[Finding]:
    use = sample.hardware
    if use.heat_throttles > 0:
        to = f" to {use.speed_share:.0%} of its speed" if use.speed_share else ""
        words = f"its processor was too hot, and was slowed{to}"
        yield Finding(what="thermal", words=words, value=use.speed_share, lasts=False)
    if use.uncorrected > 0:
        yield Finding(
            what="ecc_errors",
            words=f"{use.uncorrected:.0f} memory errors could not be corrected (ECC)",
            value=use.uncorrected,
            lasts=False,
        )
    if use.corrected > 0:
        yield Finding(
            what="ecc_errors",
            words=f"{use.corrected:.0f} memory errors were corrected (ECC)",
            value=use.corrected,
            key="corrected",
            lasts=False,
        )


def _oom(sample: Sample) -> Iterator[Finding]:
    if count := sample.memory.oom_kills:
        where = "of its cgroup" if sample.memory.oom_in_group else "of this machine"
        what = "a process" if count == 1 else f"{count} processes"
        yield Finding(
            what="oom_kill", words=f"the kernel killed {what} {where} for want of memory", value=count, lasts=False
        )


def _kernel(sample: Sample) -> Iterator[Finding]:
    for line in dict.fromkeys(sample.kernel_lines):
        yield Finding(what="kernel_log", words=f"its kernel said: {line}", value=1, lasts=False, key=line)


def _clock(sample: Sample) -> Iterator[Finding]:
    use = sample.clock
    if use.suspended_s:
        words = "the machine was suspended"
        yield Finding(what="clock_jumped", words=words, measured_s=use.suspended_s, lasts=False, key="suspended")
    if use.late_s:
        words = "the launcher itself did not run: it was stopped with the machine, or had no core"
        yield Finding(what="clock_jumped", words=words, measured_s=use.late_s, lasts=False, key="late")
    if use.set_by_s:
        way = "forward" if use.set_by_s > 0 else "back"
        words = f"its time of day was set {way} by {abs(use.set_by_s):.1f} s"
        yield Finding(what="time_set", words=words, lasts=False)


RULES: tuple[Callable[[Sample], Iterator[Finding]], ...] = (
    *(_stopped, _throttled, _busy_neighbour, _swapping, _memory_short, _disk_slow, _blocked),
    *(_gil_held, _network, _hardware, _oom, _kernel, _clock),
)
