"""What the probes of all nodes say together: which link is slow or cut, or which node's adapter, processor or disk."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.probes.link import LinkSeen
from outlast.diagnostics.probes.node_test import NodeTest
from outlast.diagnostics.syndromes.links import locate
from outlast.diagnostics.syndromes.verdict import Culprit

Floats = npt.NDArray[np.float64]

SLOW_FACTOR = 2.0
"""A link, or a node, is slow if it takes this many times as long as the better ones;"""
SLOW_DISK_FACTOR = 10.0
"""a disk, which others may be using, this many times."""
GOOD_PERCENT = 25
"""How fast links are is told from the better ones: of three nodes, two thirds of the links may be a slow one's."""
PARTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("compute_flops", "computes at", lambda value: f"{value / 1e9:.3g} GFLOP/s"),
    ("memory_bytes_s", "copies memory at", lambda value: f"{fmt.size(value)}/s"),
    ("disk_bytes_s", "writes its disk at", lambda value: f"{fmt.size(value)}/s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What one node has seen."""

    links: Mapping[int, LinkSeen]
    """By the number of the other node."""
    test: NodeTest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeFinding:
    """One thing that is wrong."""

    culprit: Culprit | None
    """None: the network as a whole."""
    words: str
    """With the values: ``2.4 MB/s from b to a, of 24 MB/s``."""
    is_link: bool = False
    """Whether it was measured between nodes, and not on one."""

    def __str__(self) -> str:
        return f"{self.culprit or 'the network'}: {self.words}"


def judge(
    reports: Mapping[int, ProbeReport],
    nodes: Sequence[str],
    *,
    least_bytes_s: float | None = None,
    link_factor: float = SLOW_FACTOR,
) -> tuple[ProbeFinding, ...]:
    """What is wrong; empty if nothing is.

    Args:
        reports: by node; of a node that was not heard there is none, which is a finding of its own.
        nodes: their names.
        least_bytes_s: what each link must do; None compares them with each other, which between two nodes says nothing
            but whether they are connected.
        link_factor: ... and a link is slow that takes this many times as long as the better ones.
    """
    silent = [number for number in range(len(nodes)) if number not in reports]
    if 2 * len(silent) > len(nodes):  # it may be this node that is not heard
        heard = ", ".join(nodes[one] for one in sorted(reports)[:8]) or "none"
        words = f"{len(reports)} of {len(nodes)} nodes were heard here ({heard}): too few to tell whose fault it is"
        return (ProbeFinding(culprit=None, words=words),)
    found = [
        ProbeFinding(culprit=Culprit(place="node", nodes=(nodes[one],)), words="it took no part in the probe")
        for one in silent
    ]
    found += _tests(reports, nodes)
    link = _links(reports, nodes, silent, least_bytes_s, link_factor)
    return (*found, *([link] if link is not None else []))


def wrong_with(test: NodeTest, others: Sequence[NodeTest]) -> tuple[str, ...]:
    """What a node's own test shows: what failed in it, and what takes too long beside the other nodes.

    Args:
        test: of the node.
        others: of nodes like it.
    """
    found = list(test.reasons)
    for field, does, shown in PARTS:
        own = getattr(test, field)
        theirs = [value for each in others if (value := getattr(each, field))]
        if own is None or not theirs:
            continue
        typical = statistics.median(theirs)
        factor = SLOW_DISK_FACTOR if field == "disk_bytes_s" else SLOW_FACTOR
        if own * factor < typical:
            found.append(f"{does} {shown(own)}, its peers at {shown(typical)} in the median")
    return tuple(found)


def described(test: NodeTest) -> str:
    """``computes at 31 GFLOP/s, copies memory at 5.1 GB/s``: what is known of it."""
    known = [(does, shown, value) for field, does, shown in PARTS if (value := getattr(test, field)) is not None]
    return ", ".join(f"{does} {shown(value)}" for does, shown, value in known)


def _tests(reports: Mapping[int, ProbeReport], nodes: Sequence[str]) -> list[ProbeFinding]:
    tests = {node: report.test for node, report in sorted(reports.items()) if report.test is not None}
    return [
        ProbeFinding(culprit=Culprit(place="node", nodes=(nodes[node],)), words=words)
        for node, test in tests.items()
        for words in (
            *(["; ".join(test.reasons)] if test.reasons else []),
            *wrong_with(replace(test, reasons=()), [each for one, each in tests.items() if one != node]),
        )
    ]


def _links(
    reports: Mapping[int, ProbeReport],
    nodes: Sequence[str],
    silent: Sequence[int],
    least_bytes_s: float | None,
    factor: float,
) -> ProbeFinding | None:
    """The worst of what is wrong with links; rates are [from, to]."""
    rates: Floats = np.full((len(nodes), len(nodes)), np.nan)
    reasons: dict[tuple[int, int], str] = {}
    for node, report in reports.items():
        for peer, seen in report.links.items():
            if peer in silent:
                continue
            if seen.received_bytes_s is not None:
                rates[peer, node] = seen.received_bytes_s
            elif seen.reason:
                rates[peer, node] = 0.0
                reasons[peer, node] = seen.reason
    known = np.isfinite(rates)
    if not known.any():
        return None
    working = rates[known & (np.nan_to_num(rates) > 0)]
    good = float(np.percentile(working, 100 - GOOD_PERCENT, method="higher")) if len(working) else 0.0
    least = good / factor if least_bytes_s is None else least_bytes_s
    bad = known & (np.nan_to_num(rates) < least)
    cut = known & (np.nan_to_num(rates) == 0)
    for which in (cut, bad):  # what is cut says more than what is slow
        culprit = locate(which, known, nodes)
        if culprit is not None:
            return ProbeFinding(culprit=culprit, words=_described(which, rates, reasons, nodes, good), is_link=True)
    if bad.any() and least_bytes_s is not None:
        return ProbeFinding(culprit=None, words=_described(bad, rates, reasons, nodes, good), is_link=True)
    return None


def _described(
    which: npt.NDArray[np.bool_],
    rates: Floats,
    reasons: Mapping[tuple[int, int], str],
    nodes: Sequence[str],
    good: float,
) -> str:
    """The worst of these links, and how many there are."""
    cells = [(int(a), int(b)) for a, b in np.argwhere(which)]
    source, target = min(cells, key=lambda cell: float(rates[cell]))
    rate = float(rates[source, target])
    more = f"; and {len(cells) - 1} more" if len(cells) > 1 else ""
    pair = f"from {nodes[source]} to {nodes[target]}"
    if rate <= 0:
        return f"no probe {pair}: {reasons.get((source, target), 'nothing came')}{more}"
    return f"{fmt.size(rate)}/s {pair}, where good links have {fmt.size(good)}/s{more}"
