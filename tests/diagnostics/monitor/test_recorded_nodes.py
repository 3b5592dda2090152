"""What the monitor sees in the files of several kernels, of version 1 and 2 of cgroups, and where files are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outlast.diagnostics.monitor.cgroups import CpuQuotas
from outlast.diagnostics.monitor.devices import Disks, Network
from outlast.diagnostics.monitor.files import SystemFiles
from outlast.diagnostics.monitor.findings import find
from outlast.diagnostics.monitor.hardware import MATTERS, Hardware, HardwareUse
from outlast.diagnostics.monitor.memory import Memory, Pressure
from outlast.diagnostics.monitor.sample import Sampler
from tests.diagnostics.monitor.nodes import PSI, V1, V2, write

PID = os.getpid()


def v1(throttled_s: float, periods: int) -> dict[str, str]:
    """A rank in a group of version 1 whose parent has the quota."""
    return {
        "proc/self/mountinfo": V1,
        f"proc/{PID}/cgroup": "4:cpu,cpuacct:/pod/job\n1:name=systemd:/x\n",
        "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/pod/cpu.stat": (
            f"nr_periods {periods}\nnr_throttled {periods}\nthrottled_time {int(throttled_s * 1e9)}\n"
        ),
        "sys/fs/cgroup/cpu,cpuacct/pod/job/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/pod/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/pod/job/cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0\n",
    }


def v2(throttled_s: float, periods: int) -> dict[str, str]:
    """... of version 2, where the group of a container is the root that it sees."""
    stat = f"nr_periods {periods}\nnr_throttled {periods}\nthrottled_usec {int(throttled_s * 1e6)}\n"
    return {
        "proc/self/mountinfo": V2,
        f"proc/{PID}/cgroup": "0::/pod/job\n",
        "sys/fs/cgroup/pod/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/pod/cpu.stat": f"usage_usec 5\nuser_usec 4\nsystem_usec 1\n{stat}nr_bursts 0\n",
        "sys/fs/cgroup/pod/job/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pod/job/cpu.stat": "usage_usec 5\nuser_usec 4\nsystem_usec 1\n",
    }


@pytest.mark.parametrize("files", [v1, v2], ids=["v1", "v2"])
def test_the_quota_of_a_group_around_the_ranks_own_counts(tmp_path: Path, files: object) -> None:
    assert callable(files)
    write(tmp_path, files(3.0, 100))
    quotas = CpuQuotas(tmp_path)
    ((before, inside),) = quotas.of({7: PID, 8: PID}).values()
    assert (before.name, before.cores, inside) == ("/pod", 0.5, (7, 8))
    write(tmp_path, files(3.8, 110))
    ((after, _),) = quotas.of({7: PID, 8: PID}).values()
    assert after.held_back_s(before, 1.0) == pytest.approx(0.8)
    # two of its CPUs were held back at once, which is no more than the time that passed
    write(tmp_path, files(5.3, 125))
    ((later, _),) = quotas.of({7: PID, 8: PID}).values()
    assert later.held_back_s(after, 1.0) == 1.0


def test_a_throttled_group_is_a_finding_with_its_rank(tmp_path: Path) -> None:
    write(tmp_path, v2(0.0, 0))
    sampler = Sampler(None, root=tmp_path)
    assert find(sampler.look({7: PID})) == [], "there is nothing to compare the first sample with"
    write(tmp_path, v2(100.0, 50))
    (found,) = find(sampler.look({7: PID}))
    assert (found.what, found.ranks) == ("cpu_throttled", (7,))
    assert "its cgroup /pod was throttled (CPU quota of 0.5 cores)" in found.words


def test_without_any_file_nothing_is_found_and_all_that_is_absent_is_named_once(tmp_path: Path) -> None:
    sampler = Sampler(None, root=tmp_path)
    for _ in range(3):
        assert find(sampler.look({0: PID})) == []
    kinds = {"pressure", "swap and reclaim", "disks", "network", "kernel log", "use of the cores", "memory cgroup"}
    assert kinds <= sampler.absent.keys()
    assert all("No such file" in why or "none is" in why or "no controller" in why for why in sampler.absent.values())


def test_what_cannot_be_understood_costs_that_part_alone(tmp_path: Path) -> None:
    write(tmp_path, {"proc/diskstats": "8 0 sda one two 3 4 5 6 7 8 9 10 11 12\n", "proc/vmstat": "pswpin 0\n"})
    sampler = Sampler(None, root=tmp_path)
    sampler.look({})
    write(tmp_path, {"proc/vmstat": "pswpin 100000000\n"})
    (found,) = find(sampler.look({}))
    assert found.what == "swap"
    assert "not understood" in sampler.absent["disks"]


def test_a_file_that_is_there_and_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/pressure/memory").symlink_to("/proc/self/mem")  # its first page is not mapped
    write(tmp_path, {"proc/diskstats": ""})
    sampler = Sampler(None, root=tmp_path)
    assert find(sampler.look({})) == []
    assert "Input/output error" in sampler.absent["pressure"]
    assert "disks" not in sampler.absent


@pytest.mark.parametrize("has_full", [True, False], ids=["linux 5.13", "before"])
def test_pressure(tmp_path: Path, has_full: bool) -> None:
    def text(total_us: int) -> str:
        lines = PSI.format(avg="12.50", some=total_us, full=total_us // 2).splitlines(keepends=True)
        return "".join(lines if has_full else lines[:1])

    write(tmp_path, {"proc/pressure/memory": text(1_000_000)})
    pressure = Pressure(SystemFiles(tmp_path), "memory")
    pressure.look()
    write(tmp_path, {"proc/pressure/memory": text(1_400_000)})
    told = pressure.look()
    assert told.some_s == pytest.approx(0.4)
    assert told.full_s == (pytest.approx(0.2) if has_full else None)


def test_pressure_of_memory_is_found_with_psi_and_without(tmp_path: Path) -> None:
    info = "MemTotal: 1000 kB\nMemAvailable: 500 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"
    write(tmp_path, {"proc/meminfo": info, "proc/vmstat": "allocstall_normal 5\nallocstall_movable 0\n"})
    without = Sampler(None, root=tmp_path)
    without.look({})
    write(tmp_path, {"proc/vmstat": "allocstall_normal 5\nallocstall_movable 900000\n"})
    assert [one.what for one in find(without.look({}))] == ["memory_pressure"]
    write(tmp_path, {"proc/pressure/memory": PSI.format(avg=0, some=0, full=0)})
    psi = Sampler(None, root=tmp_path)
    psi.look({})
    write(tmp_path, {"proc/pressure/memory": PSI.format(avg=90, some=60_000_000, full=0)})
    (found,) = find(psi.look({}))
    assert (found.what, found.measured_s) == ("memory_pressure", pytest.approx(60.0))


DISK = "   8       0 {name} {reads} 0 99 {ms} {writes} 0 99 {ms} {waiting} {busy} 500"
PARTS = {"linux 4.14": "", "linux 4.18": " 0 0 0 0", "linux 5.5": " 0 0 0 0 7 9"}


@pytest.mark.parametrize("kernel", PARTS)
def test_a_slow_disk_and_one_that_is_stuck(tmp_path: Path, kernel: str) -> None:
    def line(name: str, **values: int) -> str:
        return DISK.format(name=name, **values) + PARTS[kernel] + "\n"

    def lines(done: int, ms: int, busy: int) -> str:
        # two disks, a partition of the first, and a loop device, which is no disk
        slow = {"reads": done, "writes": 0, "ms": ms, "waiting": 1, "busy": busy}
        stuck = {"reads": 5, "writes": 5, "ms": 9, "waiting": 3, "busy": busy}
        return line("sda", **slow) + line("sda1", **slow) + line("nvme0n1", **stuck) + line("loop0", **slow)

    for name in ("sda", "nvme0n1", "loop0"):
        (tmp_path / "sys/block" / name).mkdir(parents=True)
    write(tmp_path, {"proc/diskstats": lines(10, 100, 0)})
    disks = Disks(SystemFiles(tmp_path))
    sampler = Sampler(None, root=tmp_path)
    disks.look()
    sampler.look({})
    write(tmp_path, {"proc/diskstats": lines(20, 2600, 60_000)})
    slow, stuck = disks.look()
    assert (slow.name, slow.done, slow.wait_s) == ("sda", 10, 0.5)
    assert (stuck.name, stuck.done, stuck.waiting) == ("nvme0n1", 0, 3)
    words = [one.words for one in find(sampler.look({}))]
    assert words == [
        "its disk sda took 500 ms for a read or write",
        "its disk nvme0n1 finished nothing, with 3 reads and writes waiting",
    ]


def test_the_oom_killer_swap_and_counters_that_begin_anew(tmp_path: Path) -> None:
    group = {
        "proc/self/mountinfo": V2,
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.events": "low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\n",
    }
    write(tmp_path, {**group, "proc/vmstat": "pswpin 10\npswpout 20\noom_kill 4\n"})
    memory = Memory(SystemFiles(tmp_path))
    memory.look()
    killed = "low 0\nhigh 0\nmax 9\noom 3\noom_kill 3\n"
    write(tmp_path, {"proc/vmstat": "pswpin 30\npswpout 5\noom_kill 6\n", "sys/fs/cgroup/job/memory.events": killed})
    use = memory.look()
    assert (use.oom_kills, use.oom_in_group) == (2, True)
    assert use.swapped_in_bytes == 20 * os.sysconf("SC_PAGE_SIZE")
    assert use.swapped_out_bytes == 0, "a counter that is smaller than before has begun anew"


def test_a_network_that_loses_and_an_interface_with_errors(tmp_path: Path) -> None:
    def files(again: int, errors: int) -> dict[str, str]:
        zeros = " 0" * 5
        return {
            "proc/net/dev": f"Inter-| Receive\n face |bytes\n  lo: 9 9 9 9{zeros[2:]} 0 9 9 9{zeros}\n"
            f"eth0:100 1 {errors} 0 0 0 0 0 200 1 0 0 0 0 0 0\n",
            "proc/net/snmp": f"Tcp: RtoAlgorithm OutSegs RetransSegs\nTcp: 1 {again * 10} {again}\n",
        }

    write(tmp_path, files(100, 3))
    sampler = Sampler(None, root=tmp_path)
    network = Network(SystemFiles(tmp_path))
    network.look()
    sampler.look({})
    write(tmp_path, files(160, 5))
    use = network.look()
    assert (use.segments, use.sent_again, use.errors, use.with_errors) == (600, 60, 2, "eth0")
    assert [one.key for one in find(sampler.look({}))] == ["tcp", "eth0"]


def test_heat_and_memory_errors(tmp_path: Path) -> None:
    def files(count: int) -> dict[str, str]:
        return {
            "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": f"{count}\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1200000\n",
            "sys/devices/system/cpu/cpu1/cpufreq/cpuinfo_max_freq": "3000000\n",
            "sys/devices/system/edac/mc/mc0/ce_count": f"{count}\n",
            "sys/devices/system/edac/mc/mc0/ue_count": "0\n",
        }

    write(tmp_path, files(4))
    hardware = Hardware(SystemFiles(tmp_path))
    hardware.look(frozenset({0, 1}))
    write(tmp_path, files(6))
    use = hardware.look(frozenset({0, 1}))
    assert use == HardwareUse(heat_throttles=2, speed_share=0.4, corrected=2, uncorrected=0)


@pytest.mark.parametrize(
    ("line", "matters"),
    [
        ("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", True),
        ("Out of memory: Killed process 7 (python) total-vm:9kB", True),
        ("EDAC MC0: 1 CE memory read error on CPU_SrcID#0", True),
        ("INFO: task python:12 blocked for more than 120 seconds.", True),
        ("nfs: server files not responding, still trying", True),
        ("mlx5_core 0000:01:00.0 eth2: Link is Down", True),
        ("blk_update_request: I/O error, dev sda, sector 1", True),
        ("CPU3: Core temperature is above threshold, cpu clock is throttled", True),
        ("usb 1-1: new high-speed USB device number 4", False),
        ('audit: type=1400 apparmor="STATUS"', False),
    ],
)
def test_lines_of_the_kernels_log_that_matter(line: str, matters: bool) -> None:
    assert bool(MATTERS.search(line)) == matters
