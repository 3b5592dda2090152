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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from outlast.diagnostics.probes.judge import SLOW_FACTOR, ProbeReport, judge
from outlast.diagnostics.probes.link import LinkLimits, LinkProbe, LinkSeen
from outlast.diagnostics.probes.node_test import NodeTest, self_test
from outlast.diagnostics.probes.pairs import rounds
from outlast.diagnostics.syndromes.places import node_names
from outlast.launch.sealed import Seal

PREFIX = "outlast/probe"
POLL_S = 0.05
RESULT_S = 10.0
"""How much longer than node 0 the others wait."""
BESIDE_RANKS = LinkLimits(stream_s=0.3, warmup_s=0.1, stream_bytes=64 << 20)
BESIDE_RANKS_FACTOR = 3.0
"""A link that ranks use at the same time may do half as much as another."""
SLOT_REST_S = 0.6
"""What a pair takes beside its two streams: it connects, and the sender's buffers run empty."""
MOST_FINDINGS = 20
MOST_ROWS = 64
MOST_TEXT_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What came of it, as node 0 says."""

    heard: int
    """How many nodes took part."""
    findings: tuple[str, ...]
    """What is wrong, each with whom and the values, :data:`MOST_FINDINGS` at most; empty if nothing is."""
    rows: tuple[tuple[str, str], ...] = ()
    """Each node, and what it has measured; of jobs of up to :data:`MOST_ROWS` nodes."""
    link_place: str = ""
    """``link`` or ``node``, for its adapter, if that stands out by its links."""
    link_nodes: tuple[int, ...] = ()
    """Its numbers."""
    link_words: str = ""
    """With the values."""


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
    beside_ranks: bool = False,
    ends: Callable[[], bool] = lambda: False,
) -> Probed:
    """Try out this node, and its links to others. To be called by the launchers of all nodes.

    It takes about three seconds beside what it waits for others, and at most ``limit_s`` and ``meet_s``. Beside ranks
    that train it takes up to ten: links alone are tried out, for a shorter time, at most half of the nodes at once
    (of two or three, one pair), and one is slow only if it takes three times as long as the better ones.

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
        beside_ranks: whether ranks train meanwhile. What node 0 says holds for all.
        ends: whether to wait for nobody any more.

    Raises:
        torch.distributed.DistError: the store does not answer.
        OSError: no port is free.
    """
    met_by_s = time.monotonic() + meet_s
    first = _Board(store, secret, occasion, ends)
    if node == 0:  # what was said on an earlier occasion does not open with this one's token
        first.put("token", {"token": secrets.token_hex(16), "beside_ranks": beside_ranks})
    told = first.get("token", met_by_s)
    beside_ranks = bool(told.get("beside_ranks"))
    board = _Board(store, secret, f"{occasion}/{told.get('token', '')}", ends)
    with LinkProbe(board.seal("link"), node, limits or (BESIDE_RANKS if beside_ranks else None)) as links:
        own = address or _own_address(store)
        board.put(f"{node}/there", {"address": own, "port": links.port})
        partners = [next((a + b - node for a, b in pairs if node in (a, b)), None) for pairs in rounds(nodes)]
        known = range(nodes) if node == 0 else [one for one in partners if one is not None]
        there = {one: board.get(f"{one}/there", met_by_s) for one in known}
        if beside_ranks and node == 0:
            board.put("go", {"go": True})
        elif beside_ranks:  # so that all count the same slots
            board.get("go", met_by_s)
        began_s = time.monotonic()
        until_s = began_s + limit_s
        slots_s = _slots_s(nodes, node, links.limits) if beside_ranks else [0.0] * len(partners)
        seen: dict[int, LinkSeen] = {}
        for number, peer in enumerate(partners):
            _wait_until(began_s + slots_s[number], ends)
            if peer is not None and there[peer] and not ends():
                # a node that waited for one that is gone comes later, and those after it later still
                wait_s = min(meet_s + 2 * (number + 1) * links.limits.pair_s, max(until_s - time.monotonic(), 0.1))
                seen[peer] = _measured(links, node, peer, there[peer], wait_s)
        report = {
            "host": socket.gethostname()[:MOST_TEXT_CHARS],
            "links": {str(one): asdict(each) for one, each in seen.items()},
            # not before: it would slow down the links of this node
            "test": None if beside_ranks else self_test(folder).as_json(),
        }
        board.put(f"{node}/seen", report)
        if node != 0:
            return _as_told(board.get("result", until_s + RESULT_S))
        said = {one: board.get(f"{one}/seen", until_s) for one in range(nodes) if there[one]}
        probed = _judged(said, nodes, least_bytes_s, BESIDE_RANKS_FACTOR if beside_ranks else SLOW_FACTOR)
        board.put("result", asdict(probed))
        return probed


def _slots_s(nodes: int, node: int, limits: LinkLimits) -> list[float]:
    """When a node's pair of each round begins, seconds after all have come: with at most half of the nodes at once."""
    width, long_s = max(1, nodes // 4), 2 * limits.stream_s + SLOT_REST_S
    found, slot = [], 0
    for pairs in rounds(nodes):
        at = next((place for place, pair in enumerate(pairs) if node in pair), 0)
        found.append((slot + at // width) * long_s)
        slot += -(-len(pairs) // width)
    return found


def _wait_until(until_s: float, ends: Callable[[], bool]) -> None:
    while (left_s := until_s - time.monotonic()) > 0 and not ends():
        time.sleep(min(left_s, POLL_S))


def _judged(said: dict[int, dict[str, Any]], nodes: int, least_bytes_s: float | None, factor: float) -> Probed:
    """What all nodes have said together."""
    reports = {one: report for one, raw in said.items() if (report := _report(raw)) is not None}
    names = node_names([str(said.get(one, {}).get("host", "")) for one in range(nodes)])
    findings = judge(reports, names, least_bytes_s=least_bytes_s, link_factor=factor)
    link = next((one for one in findings if one.is_link and one.culprit is not None), None)
    culprit = link.culprit if link is not None else None
    return Probed(
        link_place=culprit.place if culprit is not None else "",
        link_nodes=tuple(map(names.index, culprit.nodes)) if culprit is not None else (),
        link_words=link.words if link is not None else "",
        heard=len(reports),
        findings=tuple(map(str, findings[:MOST_FINDINGS])),
        rows=_rows(names, reports) if nodes <= MOST_ROWS else (),
    )


def _as_told(raw: dict[str, Any]) -> Probed:
    """What node 0 said."""
    try:
        return Probed(
            heard=int(raw["heard"]),
            findings=tuple(str(one) for one in raw["findings"]),
            rows=tuple((str(name), str(words)) for name, words in raw["rows"]),
            link_place=str(raw["link_place"]),
            link_nodes=tuple(map(int, raw["link_nodes"])),
            link_words=str(raw["link_words"]),
        )
    except (KeyError, TypeError, ValueError):
        return Probed(heard=0, findings=("node 0 was not heard: what came of the probe is not known here",))


def _measured(links: LinkProbe, node: int, peer: int, there: dict[str, Any], wait_s: float) -> LinkSeen:
    """The smaller number calls."""
    if node > peer:
        return links.answer(peer, wait_s)
    try:
        address, port = str(there["address"]), int(there["port"])
    except (KeyError, TypeError, ValueError):
        return LinkSeen(reason="it does not say where it listens")
    return links.call(peer, address, port, wait_s)


def _report(raw: dict[str, Any]) -> ProbeReport | None:
    """What a node has seen; None if it was not heard, or says what nobody understands."""
    try:
        links = {int(one): _link(each) for one, each in raw["links"].items()}
        test = None if raw["test"] is None else NodeTest.from_json(raw["test"])
        return ProbeReport(links=links, test=test)
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

    def __init__(
        self,
        store: dist.Store,  # type: ignore[name-defined]
        secret: bytes,
        occasion: str,
        ends: Callable[[], bool],
    ) -> None:
        self._store, self._secret, self._occasion, self._ends = store, secret, occasion, ends

    def seal(self, name: str) -> Seal:
        """Of one message, and of this occasion."""
        return Seal(self._secret, f"{PREFIX}/{self._occasion}/{name}")

    def put(self, name: str, message: dict[str, Any]) -> None:
        self._store.set(self._key(name), self.seal(name).seal(json.dumps(message).encode()))

    def get(self, name: str, until_s: float) -> dict[str, Any]:
        """The message; empty if it has not come, or is nobody's who knows the secret."""
        key = self._key(name)
        while not self._store.check([key]):
            if time.monotonic() >= until_s or self._ends():
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


def _rows(names: Sequence[str], reports: dict[int, ProbeReport]) -> tuple[tuple[str, str], ...]:
    rows = []
    for number, name in enumerate(names):
        report = reports.get(number)
        links = [
            f"from {names[peer]} {each.received_bytes_s / 1e6:.1f} MB/s"
            if each.received_bytes_s is not None
            else f"from {names[peer]} nothing ({each.reason})"
            for peer, each in sorted(report.links.items() if report is not None else ())
            if 0 <= peer < len(names)
        ]
        rows.append((name, "; ".join(links) if report is not None else "not heard"))
    return tuple(rows)
