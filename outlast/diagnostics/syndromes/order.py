"""Ranks that have left the common order: their calls cannot meet, or each waits where the other one is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from outlast.diagnostics.live.desync import decide, describe
from outlast.diagnostics.live.recorder import Collective, Ring
from outlast.diagnostics.syndromes.meetings import Meetings
from outlast.diagnostics.syndromes.trace import DEAD, Ints, Trace
from outlast.diagnostics.syndromes.verdict import Culprit, Verdict, named
from outlast.diagnostics.syndromes.waits import Wait, Waits

KEPT = 512
"""Newest calls of a group that are compared with earlier ones."""


def find_mismatch(trace: Trace, meetings: Meetings) -> Verdict | None:
    """The first collective in which ranks have entered different operations, or different sizes or types.

    Who left the order is who is alone with what it entered; where two stand against two, the one whose collective is
    not what followed the same ones before (:func:`outlast.diagnostics.live.desync.decide`).
    """
    calls, job = trace.calls, trace.job
    dead = np.zeros(len(meetings), dtype=np.bool_)
    dead[meetings.of_row[trace.signs.state[calls.rank[meetings.rows]] == DEAD]] = True
    odd = np.flatnonzero(meetings.differ & ((meetings.pending > 0) | dead))
    if not len(odd):
        return None
    entered_s = trace.common_s(calls.rank, calls.enter_s)
    began_s = [float(entered_s[meetings.rows_of(int(meeting))].min()) for meeting in odd]
    meeting = int(odd[int(np.argmin(began_s))])
    rows = meetings.rows_of(meeting)
    start = int(meetings.starts[meeting])
    codes = meetings.codes[start : start + len(rows)]
    votes = Counter(codes.tolist())
    most = max(votes.values())
    usual = [code for code, count in votes.items() if count == most]
    if len(usual) == 1:
        left, kept = rows[codes != usual[0]], rows[codes == usual[0]]
    else:
        one, other = rows[codes == usual[0]], rows[codes == usual[1]]
        first, _ = decide(int(calls.seq[rows[0]]), _ring(trace, int(one[0])), _ring(trace, int(other[0])))
        left, kept = (one, other) if first.rank == int(calls.rank[one[0]]) else (other, one)
    ranks = tuple(sorted(map(int, calls.rank[left])))
    row, usual_row = int(left[0]), int(kept[0])
    group = job.groups[int(calls.group[row])]
    others = tuple(sorted(map(int, calls.rank[kept])))
    return Verdict(
        syndrome="desynchronised",
        culprit=Culprit(place="rank", ranks=ranks, nodes=tuple(dict.fromkeys(job.node(rank) for rank in ranks))[:4]),
        evidence=(
            f"collective #{int(calls.seq[row])} of group {group} is {describe(_collective(trace, row))}"
            f" on rank{'s' if len(ranks) > 1 else ''} {named(ranks)}, and "
            f"{describe(_collective(trace, usual_row))} on "
            f"rank{'s' if len(others) > 1 else ''} {named(others)}"
        ),
        ruled_out=("the network and the processes: these calls can never meet",),
        confidence="certain" if len(usual) == 1 and most > 1 else "likely",
        step=int(calls.step[usual_row]),
        cost_s=float(trace.waited_s[rows].max()) or None,
    )


def find_circle(trace: Trace, waits: Waits, circle: Mapping[int, tuple[float, Wait]]) -> Verdict | None:
    """Ranks that wait for one another, each in another collective: the one a step ahead has left something out.

    None where they are in the same step: then a rank among them may do something else while its calls are pending.
    """
    calls = trace.calls
    step_of: dict[int, int] = {}
    for one in waits.all:
        for row in _rows(trace, one):
            rank = int(calls.rank[row])
            step_of[rank] = max(step_of.get(rank, -1), int(calls.step[row]))
    steps = {rank: step_of[rank] for rank in circle if rank in step_of}
    if not steps or max(steps.values()) == min(step_of.values()):
        return None
    furthest = max(steps.values())
    ahead = tuple(sorted(rank for rank, step in steps.items() if step == furthest))
    if len(ahead) * 2 > len(step_of):
        return None
    waited_s, wait = circle[ahead[0]]
    group = trace.job.groups[wait.group]
    return Verdict(
        syndrome="desynchronised",
        culprit=Culprit(
            place="rank", ranks=ahead, nodes=tuple(dict.fromkeys(trace.job.node(rank) for rank in ahead))[:4]
        ),
        evidence=(
            f"ranks wait for one another: rank{'s' if len(ahead) > 1 else ''} {named(ahead)} wait in step {furthest}, "
            f"while ranks {named(tuple(map(int, wait.waiters)))} have waited {waited_s:.1f} s in "
            f"{calls.name(wait.row)} of group {group}, which rank {ahead[0]} has left out"
        ),
        ruled_out=("a rank that does nothing: each of them waits inside a collective",),
        confidence="likely",
        step=int(calls.step[wait.row]),
        cost_s=waited_s,
    )


def _rows(trace: Trace, wait: Wait) -> Ints:
    calls = trace.calls
    same = (calls.group == wait.group) & (calls.seq == calls.seq[wait.row]) & calls.pending
    return np.flatnonzero(same)


def _collective(trace: Trace, row: int) -> Collective:
    calls = trace.calls
    done_s = float(calls.done_s[row])
    return Collective(
        seq=int(calls.seq[row]),
        op=calls.ops[int(calls.op[row])],
        label=calls.dtypes[int(calls.dtype[row])],
        nbytes=int(calls.nbytes[row]),
        step=int(calls.step[row]),
        entered_s=float(calls.enter_s[row]),
        completed_s=None if np.isnan(done_s) else done_s,
    )


def _ring(trace: Trace, row: int) -> Ring:
    """What one rank has called in one group, as the comparison of two rings takes it."""
    calls = trace.calls
    rank, group = int(calls.rank[row]), int(calls.group[row])
    own = np.flatnonzero((calls.rank == rank) & (calls.group == group) & calls.collective)
    own = own[np.argsort(calls.seq[own])][-KEPT:]
    records = tuple(_collective(trace, int(one)) for one in own)
    return Ring(rank, 0, KEPT, int(calls.seq[own].max()) + 1, records, ())
