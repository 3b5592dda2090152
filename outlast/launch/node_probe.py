"""The launchers of a job's nodes try out themselves and the links between them, before any node is accused.

They find one another through the store that they have in common, each under a key of its own, and measure over
connections of their own: the training's groups have no part in it. What is read from the store carries the run's MAC.
Whoever does not come is not waited for beyond a limit.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from outlast.diagnostics.probes.judge import ProbeFinding, ProbeReport, judge
from outlast.diagnostics.probes.link import LinkLimits, LinkProbe, LinkSeen
from outlast.diagnostics.probes.node_test import NodeTest, self_test
from outlast.diagnostics.probes.pairs import rounds
from outlast.launch.sealed import Seal

PREFIX = "outlast/probe"
POLL_S = 0.05
MOST_TEXT_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What came of it; the same on all nodes that heard the same ones."""

    nodes: tuple[str, ...]
    """By number: their hosts; the number itself for one that was not heard."""
    reports: dict[int, ProbeReport]
    findings: tuple[ProbeFinding, ...]


def probe_nodes(
    store: dist.Store,  # type: ignore[name-defined]
    *,
    secret: bytes,
    occasion: str,
    node: int,
    nodes: int,
    folder: Path,
    address: str = "",
    limits: LinkLimits | None = None,
    meet_s: float = 10.0,
    limit_s: float = 60.0,
    least_bytes_s: float | None = None,
) -> Probed:
    """Try out this node, and its links to others. To be called by the launchers of all nodes.

    It takes about three seconds beside what it waits for others, and at most ``limit_s`` and ``meet_s``.

    Args:
        store: that all launchers reach, with a timeout of its own.
        secret: of the run, the same on all nodes.
        occasion: differs between two calls on the same store.
        node: this node's number.
        nodes: how many there are.
        folder: the disk that is tried out.
        address: of this node; empty takes the one from which the store is reached.
        limits: of each pair.
        meet_s: how long to wait until all nodes have come.
        limit_s: for all measurements of links, and for the others' results.
        least_bytes_s: see :func:`outlast.diagnostics.probes.judge.judge`.

    Raises:
        torch.distributed.DistError: the store does not answer.
        OSError: no port is free.
    """
    met_by_s = time.monotonic() + meet_s
    first = _Board(store, secret, occasion)
    if node == 0:  # what was said on an earlier occasion does not open with this one's token
        first.put("token", {"token": secrets.token_hex(16)})
    board = _Board(store, secret, f"{occasion}/{first.get('token', met_by_s).get('token', '')}")
    with LinkProbe(board.seal("link"), node, limits) as links:
        own = address or _own_address(store)
        board.put(f"{node}/there", {"address": own, "port": links.port, "host": socket.gethostname()[:MOST_TEXT_CHARS]})
        there = {one: board.get(f"{one}/there", met_by_s) for one in range(nodes)}
        names = _names(there)
        until_s = time.monotonic() + limit_s
        seen: dict[int, LinkSeen] = {}
        for number, pairs in enumerate(rounds(nodes)):
            peer = next((a + b - node for a, b in pairs if node in (a, b)), None)
            if peer is not None and there[peer]:
                # a node that waited for one that is gone comes later, and those after it later still
                wait_s = min(2 * (number + 1) * links.limits.pair_s, max(until_s - time.monotonic(), 0.1))
                seen[peer] = _measured(links, node, peer, there[peer], wait_s)
        # not meanwhile: it would slow down the links of this node
        report = {"links": {str(one): asdict(each) for one, each in seen.items()}, "test": self_test(folder).as_json()}
        board.put(f"{node}/seen", report)
        reports = {}
        for one in range(nodes):
            if there[one] and (read := _report(board.get(f"{one}/seen", until_s))) is not None:
                reports[one] = read
    return Probed(nodes=names, reports=reports, findings=judge(reports, names, least_bytes_s=least_bytes_s))


def _measured(links: LinkProbe, node: int, peer: int, there: dict[str, Any], wait_s: float) -> LinkSeen:
    """The smaller number calls."""
    if node > peer:
        return links.answer(peer, wait_s)
    try:
        address, port = str(there["address"]), int(there["port"])
    except (KeyError, TypeError, ValueError):
        return LinkSeen(reason="it does not say where it listens")
    return links.call(peer, address, port, wait_s)


def _names(there: dict[int, dict[str, Any]]) -> tuple[str, ...]:
    """The nodes' hosts; with their number where two have the same."""
    hosts = [str(one.get("host", "")) if one else "" for one in there.values()]
    return tuple(
        str(number) if not host else f"{number} ({host})" if hosts.count(host) > 1 else host
        for number, host in enumerate(hosts)
    )


def _report(raw: dict[str, Any]) -> ProbeReport | None:
    """What a node has seen; None if it was not heard, or says what nobody understands."""
    try:
        links = {int(one): _link(each) for one, each in raw["links"].items()}
        return ProbeReport(links=links, test=NodeTest.from_json(raw["test"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _link(raw: dict[str, Any]) -> LinkSeen:
    received, latency = (None if raw.get(one) is None else float(raw[one]) for one in ("received_bytes_s", "latency_s"))
    reason = str(raw.get("reason", ""))[:MOST_TEXT_CHARS]
    return LinkSeen(received_bytes_s=received, latency_s=latency, reason=reason)


def _own_address(store: dist.Store) -> str:  # type: ignore[name-defined]
    """From which this node reaches the store; no packet is sent for it. The host's name where the store has no port."""
    if not isinstance(store, dist.TCPStore):  # type: ignore[attr-defined]
        return socket.gethostname()
    family, kind, _, _, where = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


class _Board:
    """Where launchers leave short messages for one another."""

    def __init__(self, store: dist.Store, secret: bytes, occasion: str) -> None:  # type: ignore[name-defined]
        self._store, self._secret, self._occasion = store, secret, occasion

    def seal(self, name: str) -> Seal:
        """Of one message, and of this occasion."""
        return Seal(self._secret, f"{PREFIX}/{self._occasion}/{name}")

    def put(self, name: str, message: dict[str, Any]) -> None:
        self._store.set(self._key(name), self.seal(name).seal(json.dumps(message).encode()))

    def get(self, name: str, until_s: float) -> dict[str, Any]:
        """The message; empty if it has not come, or is nobody's who knows the secret."""
        key = self._key(name)
        while not self._store.check([key]):
            if time.monotonic() >= until_s:
                return {}
            time.sleep(POLL_S)
        message = self.seal(name).open(self._store.get(key))
        found = json.loads(message) if message is not None else {}
        return found if isinstance(found, dict) else {}

    def _key(self, name: str) -> str:
        return f"{PREFIX}/{self._occasion}/{name}"


def meeting_store(host: str, port: int, *, node: int, nodes: int, timeout_s: float) -> dist.Store:  # type: ignore[name-defined]
    """A store on node 0, for nodes that have none in common yet.

    Raises:
        torch.distributed.DistError: node 0 is not there in time.
    """
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, nodes, is_master=node == 0, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def leave(store: dist.Store, node: int, nodes: int, wait_s: float = 5.0) -> None:  # type: ignore[name-defined]
    """The node with the store ends last, or after ``wait_s``."""
    store.set(f"{PREFIX}/left/{node}", b"1")
    until_s = time.monotonic() + wait_s
    keys = [f"{PREFIX}/left/{one}" for one in range(nodes)]
    while node == 0 and not store.check(keys) and time.monotonic() < until_s:
        time.sleep(POLL_S)


def table(probed: Probed) -> Sequence[tuple[str, str]]:
    """Each node, and what it has measured, in words."""
    rows = []
    for number, name in enumerate(probed.nodes):
        report = probed.reports.get(number)
        if report is None:
            rows.append((name, "not heard"))
            continue
        links = [
            f"from {probed.nodes[peer]} {each.received_bytes_s / 1e6:.1f} MB/s"
            if each.received_bytes_s is not None
            else f"from {probed.nodes[peer]} nothing ({each.reason})"
            for peer, each in sorted(report.links.items())
            if 0 <= peer < len(probed.nodes)
        ]
        rows.append((name, "; ".join(links)))
    return rows
