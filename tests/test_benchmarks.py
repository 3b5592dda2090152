"""The emulated cluster is what it says, and the communication benchmark runs on it; how fast anything is, it tells."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import comm
from benchmarks.cluster import Cluster

pytestmark = pytest.mark.root


def test_hosts_have_names_addresses_and_limited_links() -> None:
    serve = (
        "import socket; s = socket.create_server(('0.0.0.0', 5001)); print('up', flush=True)\n"
        "c, _ = s.accept(); n = 0\n"
        "while data := c.recv(1 << 16): n += len(data)\n"
        "print(n, flush=True)"
    )
    send = "import socket, sys; s = socket.create_connection((sys.argv[1], 5001)); s.sendall(bytes(5_000_000))"
    seconds = {}
    with Cluster(2, prefix="olt", subnet="10.97.0") as cluster:
        one, two = cluster.hosts
        name = two.popen(["hostname"], stdout=subprocess.PIPE, text=True)
        assert name.communicate(timeout=20)[0].strip() == two.name
        for rate in ("none", "40mbit"):
            cluster.set_rate(rate)
            with two.popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                assert server.stdout.readline() == "up\n"
                before, start_s = one.bytes_sent(), time.monotonic()
                assert one.popen([sys.executable, "-c", send, two.address]).wait(timeout=60) == 0
                assert server.stdout.readline() == "5000000\n"
                seconds[rate] = time.monotonic() - start_s
                assert 5_000_000 < one.bytes_sent() - before < 6_000_000
    # 5 MB at 40 Mbit/s take 1 s, less the bucket's first half megabyte: a limit that is not there would show.
    assert seconds["40mbit"] > 0.7
    assert not [
        line for line in subprocess.check_output(["ip", "netns"], text=True).splitlines() if line.startswith("olt")
    ]


@pytest.mark.soak
def test_the_communication_benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    variants = {"dense": "dense", "fp16": "fp16", "low rank": "powersgd-1", "ours": "feedback=ef14,density=0.01"}
    result = comm.measure(
        ["none", "1gbit"],
        1,
        2,
        seeds=[0],
        train=2,
        every=1,
        target=9,
        tokens=32,
        hosts=2,
        variants=variants,
        prefix="olu",
    )
    assert result.steps["dense"]["none"].ratio == [1.0]
    assert all(row.step_s[0] > 0 for by_link in result.steps.values() for row in by_link.values())
    for row in result.steps["ours"].values():
        assert row.sent_bytes[0] == pytest.approx(row.told_bytes[0], rel=0.05)
    for curves in result.losses.values():
        assert [step for step, _ in curves[0]] == [1, 2]
    assert len(comm.steps_text(result, "1gbit").splitlines()) == 1 + len(variants)
    assert len(comm.losses_text(result).splitlines()) == 1 + len(variants)


def test_steps_to_a_loss() -> None:
    curve = [(10, 5.0), (20, 3.0), (30, 3.5), (40, 2.0)]
    assert comm.steps_to(curve, 4.0) == 15
    assert comm.steps_to(curve, 2.5) == pytest.approx(30 + 10 * 2 / 3)
    assert comm.steps_to(curve, 9.0) == 10
    assert comm.steps_to(curve, 1.0) is None


@pytest.mark.soak
def test_the_benchmark_of_being_watched(root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.watch", "--ways", "collectives", "--rounds", "1", "--steps", "3"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("collectives")]
    assert [line.split()[1] for line in lines] == ["wall_s", "cpu_s"]
    assert all("every 10 ms x " in line and "every 100 ms x " in line for line in lines)


@pytest.mark.soak
def test_the_benchmark_beside_others(root: Path) -> None:
    """Without TraceML, which needs an environment of its own."""
    command = [sys.executable, "-m", "benchmarks.beside", "--only", "SIGSTOP"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| SIGSTOP")]
    assert [row.split(" | ")[1] for row in rows] == ["outlast", "torchrun"]
    assert "| rank 1 |" in rows[0]
