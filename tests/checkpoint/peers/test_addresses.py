"""Where ranks listen: on the named interface, else on an address that other nodes can reach, if there is one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.cluster import Cluster
from outlast.checkpoint import CheckpointConfig
from outlast.checkpoint.peers.addresses import is_loopback, own_address, reachable_address, routed_to
from outlast.errors import CheckpointError, OutOfRange

UNREACHABLE = "255.255.255.255"
"""The broadcast address, for which a socket needs a permission that it does not ask for."""


def addresses(name: str) -> list[str]:
    return [one.address for one in psutil.net_if_addrs()[name] if one.family in (socket.AF_INET, socket.AF_INET6)]


def test_an_interface_by_name() -> None:
    assert own_address("lo") == addresses("lo")[0]  # others may come and go: tests beside this one make hosts
    with pytest.raises(CheckpointError, match=r"has no interface 'eth77'; it has .*lo"):
        own_address("eth77")
    with pytest.raises(OutOfRange, match=r"checkpoint\.interface = ''"):
        CheckpointConfig(interface="")


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([(socket.AF_INET6, "fe80::1%x0"), (socket.AF_INET6, "fd00::7"), (socket.AF_INET, "10.0.0.7")], "10.0.0.7"),
        ([(socket.AF_INET6, "fe80::1%x0"), (socket.AF_INET6, "fd00::7")], "fd00::7"),
        ([(psutil.AF_LINK, "02:42:ac:11:00:02"), (socket.AF_INET6, "fe80::1%x0")], None),
    ],
)
def test_ipv4_before_ipv6(monkeypatch: pytest.MonkeyPatch, there: list[Any], expected: str | None) -> None:
    """Interfaces for the test, whatever this machine has."""
    kind = type(psutil.net_if_addrs()["lo"][0])
    every = {"x0": [kind(family, address, None, None, None) for family, address in there]}
    monkeypatch.setattr("outlast.checkpoint.peers.addresses.psutil.net_if_addrs", lambda: every)
    if expected is not None:
        assert own_address("x0") == expected
    else:
        with pytest.raises(CheckpointError, match=r"no IP address to listen on, only 02:42.*fe80"):
            own_address("x0")


def test_without_a_name_it_is_the_way_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert own_address(None) == "127.0.0.1"
    assert is_loopback("127.0.1.1")
    assert is_loopback("::1")
    assert not is_loopback("node-7")
    assert not is_loopback("fe80::1%eth0")


def test_where_all_are_loopback_they_stay() -> None:
    assert reachable_address(0, ["a", "b"], ["127.0.1.1", "127.0.0.1"]) == "127.0.1.1"
    assert reachable_address(1, ["a", "a", "b"], ["10.0.0.1", "127.0.0.1", "127.0.0.1"]) == "127.0.0.1", "one node"
    assert reachable_address(1, ["a", "b"], ["127.0.1.1", "10.0.0.2"]) == "10.0.0.2"


def test_no_way_to_nodes_that_can_be_reached() -> None:
    with pytest.raises(OSError, match=r"denied|unreachable"):
        routed_to(UNREACHABLE)
    with pytest.raises(CheckpointError, match=rf"other nodes cannot reach 127\.0\.1\.1,.*{UNREACHABLE}"):
        reachable_address(0, ["a", "b"], ["127.0.1.1", UNREACHABLE])


@pytest.mark.root
def test_hosts_of_their_own(tmp_path: Path, nodes: list[str]) -> None:
    with Cluster(2, prefix="olm", subnet="10.95.0") as cluster:
        ours = [host.address for host in cluster.hosts]
        # By rank: what MASTER_ADDR is there.
        cases: list[tuple[list[str], dict[str, Any]]] = [
            (["127.0.1.1", ours[0]], {}),
            (["127.0.0.1", "127.0.0.1"], {"interface": "eth0"}),
            ([ours[0], ours[0]], {"interface": "eth9"}),
            (["127.0.0.1", "127.0.0.1"], {}),
        ]
        ranks = []
        for rank, (host, memory) in enumerate(zip(cluster.hosts, nodes, strict=True)):
            seen = json.dumps([[masters[rank], settings] for masters, settings in cases])
            words = [sys.executable, "-m", "tests.checkpoint.on_host", str(rank), str(tmp_path), memory, seen]
            ranks.append(host.popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]))
        said = [[json.loads(line) for line in one.communicate(timeout=90)[0].splitlines()] for one in ranks]
        for rank, (debian, named, missing, loopback) in enumerate(said):
            assert debian == {"listens": ours[rank]}
            assert named == {"listens": ours[rank]}
            assert "rank 0: olm0 has no interface 'eth9'; it has eth0, lo" in missing["error"]
            assert "rank 1: olm1 has no interface 'eth9'" in missing["error"]
            if rank == 0:
                assert loopback == {"listens": "127.0.0.1"}
            else:
                assert "rank 1 cannot reach rank 0 at 127.0.0.1" in loopback["error"]
                assert "set checkpoint.interface" in loopback["error"]
