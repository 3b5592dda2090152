"""All have entered and nobody leaves: between whom it is stuck."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outlast.diagnostics.syndromes.links import locate, outstanding
from outlast.diagnostics.syndromes.trace import STATES, STOPPED, Bools, Ints, Trace
from outlast.diagnostics.syndromes.verdict import Confidence, Culprit, Verdict, named
from outlast.diagnostics.syndromes.waits import Wait, Waits


def find_stuck(trace: Trace, waits: Waits, limit_s: float) -> Verdict | None:
    """Who or what holds up a collective, or a send and its receive, that all its ranks have entered.

    In this order: a rank of it whose process is stopped; the link or node with messages that were never acknowledged,
    where messages are known; the ranks that are still inside, if others have left; the one pair of nodes, or node, that
    all stuck groups have in common and no working one uses; else the group as a whole.

    Args:
        trace: of the job.
        waits: of the trace.
        limit_s: how long all may be inside. While messages arrive, it is slow and not stuck.
    """
    stuck = [one for one in waits.all if not len(one.absent) and one.met_s > limit_s]
    if not stuck or _moves(trace, stuck, limit_s):
        return None
    first = max(stuck, key=lambda one: one.met_s)
    culprit, how, confidence = _locate(trace, stuck, first, limit_s)
    calls, job = trace.calls, trace.job
    left = first.entered - len(first.waiters)
    group = job.groups[first.group]
    others = f"; {len(stuck) - 1} other operations are stuck likewise" if len(stuck) > 1 else ""
    return Verdict(
        syndrome="communication_hang",
        culprit=culprit,
        evidence=(
            f"all {first.entered} ranks have entered {calls.name(first.row)} of group {group}, and "
            f"{f'only {left} have left it' if left else 'none has left it'} for {first.met_s:.1f} s: {how}{others}"
        ),
        ruled_out=("a rank that is late: nobody who is waited for is outside",),
        confidence=confidence,
        step=int(calls.step[first.row]),
        cost_s=first.met_s,
    )


def _moves(trace: Trace, stuck: Sequence[Wait], limit_s: float) -> bool:
    """Whether messages between their ranks were acknowledged within the limit, or a moment after they began to wait."""
    links = trace.links
    if not len(links):
        return False
    ranks = np.unique(np.concatenate([one.waiters for one in stuck]))
    now_s = trace.clocks.now_s[trace.job.node_of[links.source]]
    recent = now_s - links.done_s < limit_s / 2
    return bool(np.any(recent & np.isin(links.source, ranks) & np.isin(links.target, ranks)))


def _locate(trace: Trace, stuck: Sequence[Wait], first: Wait, limit_s: float) -> tuple[Culprit, str, Confidence]:
    job = trace.job
    inside = np.unique(np.concatenate([one.waiters for one in stuck]))
    halted = inside[trace.signs.state[inside] == STOPPED]
    if len(halted):
        ranks = tuple(map(int, halted))
        nodes = tuple(dict.fromkeys(job.node(rank) for rank in ranks))
        return Culprit(place="rank", ranks=ranks, nodes=nodes), f"its process is {STATES[STOPPED]}", "certain"
    links = trace.links
    lost = outstanding(links, trace.clocks.now_s[job.node_of[links.source]], limit_s) if len(links) else inside[:0]
    if len(lost):
        return _by_messages(trace, lost)
    remaining = first.entered - len(first.waiters)
    if remaining and len(first.waiters) * 2 <= first.entered:
        culprit = _narrowest(trace, first.waiters)
        return culprit, f"rank{'s' if len(first.waiters) > 1 else ''} {named(tuple(first.waiters))} remain", "likely"
    common = _common(trace, stuck)
    if common is not None:
        return common, "what all of them have in common, and none of those that work", "likely"
    ranks = tuple(map(int, job.members[first.group])) if first.entered > 2 else tuple(map(int, inside))
    if first.entered == 2 and len(inside) == 2:
        return _between(trace, int(inside[0]), int(inside[1])), "these two alone", "likely"
    return (
        Culprit(place="group", ranks=ranks, role=job.groups[first.group]),
        "the records do not tell which of its connections; a probe between pairs of its nodes will",
        "weak",
    )


def _by_messages(trace: Trace, lost: Ints) -> tuple[Culprit, str, Confidence]:
    """Whose the messages are that were never acknowledged."""
    job, links = trace.job, trace.links
    source, target = links.source[lost], links.target[lost]
    pairs = {(int(a), int(b)) for a, b in zip(source, target, strict=True)}
    waited_s = float((trace.clocks.now_s[job.node_of[source]] - links.begin_s[lost]).max())
    words = f"{len(lost)} messages on {len(pairs)} ways were never acknowledged, the oldest for {waited_s:.1f} s"
    shared = set.intersection(*({a, b} for a, b in pairs))
    peers = {a for a, _ in pairs} | {b for _, b in pairs}
    if len(shared) == 1 and len(peers) > 2:
        (rank,) = shared
        return Culprit(place="rank", ranks=(rank,), nodes=(job.node(rank),)), f"{words}, all to or from it", "likely"
    count = len(job.nodes)
    hot = np.zeros((count, count), dtype=np.bool_)
    hot[job.node_of[source], job.node_of[target]] = True
    found = locate(hot, np.ones_like(hot), job.nodes)
    if found is not None:
        return found, words, "likely"
    return _narrowest(trace, np.asarray(sorted(peers))), words, "weak"


def _between(trace: Trace, one: int, other: int) -> Culprit:
    job = trace.job
    if job.node_of[one] == job.node_of[other]:
        return Culprit(place="node", ranks=(one, other), nodes=(job.node(one),))
    return Culprit(place="link", ranks=(one, other), nodes=(job.node(one), job.node(other)))


def _narrowest(trace: Trace, ranks: Ints) -> Culprit:
    """A rank; the node of several; else these ranks."""
    job = trace.job
    nodes = np.unique(job.node_of[ranks])
    members = tuple(map(int, ranks))
    if len(ranks) == 1:
        return Culprit(place="rank", ranks=members, nodes=(job.node(members[0]),))
    if len(nodes) == 1:
        return Culprit(place="node", ranks=members, nodes=(job.nodes[int(nodes[0])],))
    return Culprit(place="rank", ranks=members, nodes=tuple(job.nodes[int(node)] for node in nodes))


def _common(trace: Trace, stuck: Sequence[Wait]) -> Culprit | None:
    """The one pair of nodes, or the one node, in all stuck operations and in none that has ended since they began."""
    job, calls = trace.job, trace.calls
    count = len(job.nodes)
    shared: Bools = ~np.eye(count, dtype=np.bool_)
    for one in stuck:
        ranks = np.asarray([int(calls.rank[one.row]), int(calls.peer[one.row])]) if calls.peer[one.row] >= 0 else None
        shared &= _pairs(trace, job.members[one.group] if ranks is None else ranks)
    began_s = min(float(trace.common_s(calls.rank[[one.row]], calls.enter_s[[one.row]])[0]) for one in stuck)
    node = job.node_of[calls.rank]
    entered_s = trace.common_s(calls.rank, calls.enter_s) - 2 * trace.clocks.error_s[node]
    works = calls.collective & ~calls.pending & (entered_s > began_s) & job.is_across[calls.group]
    for group in np.unique(calls.group[works]).tolist():
        shared &= ~_pairs(trace, job.members[group])
    pairs = {tuple(sorted((int(a), int(b)))) for a, b in np.argwhere(shared)}
    if len(pairs) == 1:
        ((one_node, other_node),) = pairs
        return Culprit(place="link", nodes=(job.nodes[one_node], job.nodes[other_node]))
    if pairs:
        common = set.intersection(*(set(pair) for pair in pairs))
        if len(common) == 1 and len(pairs) > 1:
            (found,) = common
            return Culprit(place="node", nodes=(job.nodes[found],))
    return None


def _pairs(trace: Trace, ranks: Ints) -> Bools:
    """[nodes, nodes]: whether both have ranks among these."""
    there = np.zeros(len(trace.job.nodes), dtype=np.bool_)
    there[trace.job.node_of[ranks]] = True
    both: Bools = there[:, None] & there[None, :]
    return both
