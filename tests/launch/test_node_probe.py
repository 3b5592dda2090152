"""Nodes try out one another: over a real store, real sockets, and hosts of an emulated cluster."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks.cluster import Cluster
from outlast.diagnostics.probes.link import LinkLimits
from outlast.free_port import free_port
from outlast.launch.node_probe import Probed, probe_nodes
from tests.helpers import clean_env, outlast

SECRET = b"s" * 32
QUICK = LinkLimits(stream_s=0.2, warmup_s=0.05, stream_bytes=8 << 20)


def probe(folder: Path, nodes: int, come: dict[int, bytes], occasion: str, store: dist.TCPStore) -> dict[int, Probed]:
    """What each of the nodes that come says, with the secret it has."""

    def one(node: int) -> Probed:
        return probe_nodes(
            store.clone(),
            secret=come[node],
            occasion=occasion,
            node=node,
            nodes=nodes,
            folder=folder,
            address="127.0.0.1",
            limits=QUICK,
            meet_s=3.0,
            limit_s=20.0,
        )

    with ThreadPoolExecutor(len(come)) as pool:
        return dict(zip(come, pool.map(one, come), strict=True))


def test_who_does_not_come_and_who_does_not_know_the_secret_take_no_part(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
    said = probe(tmp_path, 4, {0: SECRET, 1: SECRET, 3: b"t" * 32}, "first", store)
    for node in (0, 1):
        probed = said[node]
        absent = [one for one in probed.findings if "took no part" in one]
        assert absent == ["node 2: it took no part in the probe", "node 3: it took no part in the probe"]
        assert probed.heard == 2
        assert [words for _, words in probed.rows[2:]] == ["not heard", "not heard"]
        assert all(" MB/s" in words and "nothing" not in words for _, words in probed.rows[:2]), probed.rows
    assert said[0] == said[1]
    assert said[3].findings == ("node 0 was not heard: what came of the probe is not known here",)


COMMAND = [sys.executable, "-m", "outlast", "doctor", "--nodes", "4", "--json"]


@pytest.mark.root
@pytest.mark.soak
@pytest.mark.parametrize("rate", ["20mbit", "200mbit"])
def test_a_link_that_is_limited_to_a_tenth_is_found_and_none_where_all_are_alike(tmp_path: Path, rate: str) -> None:
    drawn = secrets.token_hex(2)  # names and addresses that no other test has
    subnet = f"10.{96 + int(drawn[:2], 16) % 128}.{int(drawn[2:], 16)}"
    with Cluster(4, "200mbit", prefix=f"o{drawn}", subnet=subnet) as cluster:

        def doctor() -> list[tuple[int, dict[str, list[str]]]]:
            port = free_port()
            started = [
                host.popen(
                    [*COMMAND, "--node", str(host.index), "--meet", f"{cluster.hosts[0].address}:{port}"],
                    env=clean_env(OUTLAST_LAUNCH_SECRET=SECRET.hex()),
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for host in cluster.hosts
            ]
            said = [one.communicate(timeout=240)[0] for one in started]
            return [(one.returncode, json.loads(text)) for one, text in zip(started, said, strict=True)]

        cluster.hosts[2].set_rate(rate)
        for status, said in doctor():
            links = [one for one in said["findings"] if " from " in one]
            if rate == "200mbit":
                assert not links, said
                continue
            assert status == 1
            assert len(links) == 1, said
            assert links[0].startswith(f"node o{drawn}2: 2."), said


def test_a_node_without_a_number_is_told_how(tmp_path: Path) -> None:
    done = outlast("doctor", "--nodes", "2", "--node", "2", "--meet", "here", "--dir", tmp_path, check=None)
    assert done.returncode == 2
    assert "give each node its number" in done.stdout + done.stderr
