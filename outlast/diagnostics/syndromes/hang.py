"""Nobody goes on: who has not entered what its peers wait in, or between whom what all have entered does not end.

A rank that waits says where. The culprit is the one that says nothing: walked back from waiter to awaited, it is where
the waits end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outlast.diagnostics.live.stall import SHARED_PHASES, SLOW_PHASES
from outlast.diagnostics.syndromes.facts import Fact, overlapping
from outlast.diagnostics.syndromes.order import find_circle
from outlast.diagnostics.syndromes.path import find_stuck
from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.trace import DEAD, STATES, STOPPED, Trace
from outlast.diagnostics.syndromes.verdict import Confidence, Culprit, Syndrome, Verdict, named
from outlast.diagnostics.syndromes.waits import Wait, Waits

MOST_NAMED = 8
"""Single ranks named at once; more that hang together have one cause, which is not one of them."""


def find_hangs(trace: Trace, waits: Waits, rules: Rules, step_limit_s: float, facts: Sequence[Fact]) -> list[Verdict]:
    """Who keeps others waiting for longer than it may; empty while nobody does.

    Nobody is named for what many ranks on several nodes do at once, until it has lasted for
    ``phases.together_limit_s``. Then, and where a program does not tell its phases, the evidence is weak.

    Args:
        trace: of the job.
        waits: of the trace.
        rules: how long a rank may keep its peers waiting in other phases than a step.
        step_limit_s: how long in a step.
        facts: what the nodes' monitors have seen.
    """
    late = {
        rank: (waited_s, wait)
        for rank, (waited_s, wait) in waits.awaited_s.items()
        if min(waited_s, _silent_s(trace, waits, rank)) > _limit_s(trace, rank, rules, step_limit_s)
    }
    roots = [rank for rank in late if not waits.is_waiting[rank]]
    if roots:
        return _absent(trace, waits, {rank: late[rank] for rank in sorted(roots)}, rules, facts)
    stuck = find_stuck(trace, waits, step_limit_s)
    if stuck is not None:
        return [stuck]
    circle = {rank: late[rank] for rank in sorted(late) if waits.is_waiting[rank]}
    if any(not len(one.absent) for one in waits.all):  # the waits end there, and it may still come to an end
        return []
    if not circle or len(circle) < len(waits.awaited_s) * rules.shared_share:
        return []
    found = find_circle(trace, waits, circle)
    if found is not None:
        return [found]
    behind = {rank: one for rank, one in circle.items() if not waits.is_held[rank]}
    return _absent(trace, waits, behind, rules, facts)


def _silent_s(trace: Trace, waits: Waits, rank: int) -> float:
    """Seconds since its last heartbeat, as far as it was watched: whoever beats does not hang."""
    node = int(trace.job.node_of[rank])
    if waits.unheard[rank] or not np.isfinite(trace.signs.beat_s[rank]):
        return np.inf
    return float(trace.clocks.now_s[node] - trace.signs.beat_s[rank] - trace.clocks.excused_s[node])


def _limit_s(trace: Trace, rank: int, rules: Rules, step_limit_s: float) -> float:
    """How long its peers wait for a rank before it is named."""
    phase, phases = str(trace.signs.phase[rank]), rules.phases
    if trace.signs.state[rank] in (STOPPED, DEAD):
        return step_limit_s
    if phase in SHARED_PHASES:
        return max(step_limit_s, phases.alone_limit_s)
    if phase in SLOW_PHASES:
        return max(step_limit_s, phases.startup_limit_s)
    if phase == "program" and trace.signs.idle_s[rank] < step_limit_s:  # it works, at whatever it may be
        return max(step_limit_s, phases.alone_limit_s)
    return step_limit_s


def _absent(
    trace: Trace, waits: Waits, roots: dict[int, tuple[float, Wait]], rules: Rules, facts: Sequence[Fact]
) -> list[Verdict]:
    """The verdicts on ranks that their peers wait for and that wait for nobody."""
    job, signs = trace.job, trace.signs
    halted = {rank: one for rank, one in roots.items() if signs.state[rank] in (STOPPED, DEAD)}
    chosen = halted or roots
    if not chosen:
        return []
    found = []
    for node in sorted({int(job.node_of[rank]) for rank in chosen}):
        ranks = [int(rank) for rank in job.ranks_on(node)]
        unheard = bool(waits.unheard[ranks[0]])
        whole = len(ranks) > 1 and all(rank in chosen for rank in ranks) and len(ranks) < job.world_size
        if whole or unheard:
            found.append(_verdict(trace, waits, ranks, chosen, rules, facts, place_node=True))
            chosen = {rank: one for rank, one in chosen.items() if rank not in ranks}
    several = len({int(job.node_of[rank]) for rank in roots}) > 1
    shared = not halted and several and len(chosen) > max(1.0, rules.shared_share * job.world_size)
    if shared or len(chosen) > MOST_NAMED:
        longest_s = max(waited_s for waited_s, _ in chosen.values())
        if longest_s <= rules.phases.together_limit_s:
            return found
        return [*found, _verdict(trace, waits, sorted(chosen), chosen, rules, facts, weak=True)]
    return found + [_verdict(trace, waits, [rank], chosen, rules, facts) for rank in chosen]


def _verdict(
    trace: Trace,
    waits: Waits,
    ranks: list[int],
    roots: dict[int, tuple[float, Wait]],
    rules: Rules,
    facts: Sequence[Fact],
    *,
    place_node: bool = False,
    weak: bool = False,
) -> Verdict:
    job, signs, calls = trace.job, trace.signs, trace.calls
    rank = max((one for one in ranks if one in roots), key=lambda one: roots[one][0])
    waited_s, wait = roots[rank]
    node = int(job.node_of[rank])
    state = int(signs.state[rank])
    unheard = bool(waits.unheard[rank])
    syndrome: Syndrome = "crash" if state == DEAD and not place_node else "non_communication_hang"
    confidence: Confidence = "likely"
    if state in (STOPPED, DEAD) and not unheard:
        confidence = "certain"
    elif weak or (signs.phase[rank] == "program" and waited_s <= rules.phases.idle_limit_s):
        confidence = "weak"
    now_s = float(trace.clocks.now_s[node])
    known = overlapping(facts, node=job.nodes[node], rank=rank, begin_s=now_s - waited_s, end_s=now_s)
    return Verdict(
        syndrome=syndrome,
        culprit=Culprit(
            place="node" if place_node else "rank",
            ranks=tuple(ranks),
            nodes=(job.nodes[node],) if place_node or len(ranks) == 1 else (),
        ),
        evidence=_evidence(trace, wait, rank, ranks, unheard),
        ruled_out=_ruled_out(waits, rank, state, unheard),
        confidence=confidence,
        step=int(calls.step[wait.row]),
        cause=known[0].words() if known else "",
        is_software=bool(known) and known[0].is_software,
        cost_s=waited_s,
    )


def _evidence(trace: Trace, wait: Wait, rank: int, ranks: Sequence[int], unheard: bool) -> str:
    job, calls, signs = trace.job, trace.calls, trace.signs
    node = int(job.node_of[rank])
    waiters = tuple(map(int, wait.waiters))
    group = f" of group {job.groups[wait.group]}" if job.groups[wait.group] else ""
    who = f"rank{'s' if len(waiters) > 1 else ''} {named(waiters)} ha{'ve' if len(waiters) > 1 else 's'}"
    text = f"{who} waited {wait.waited_s:.1f} s in {calls.name(wait.row)}{group}, which "
    if len(ranks) > 1:
        text += f"none of ranks {named(ranks)} has entered; rank {rank}: "
    else:
        text += f"rank {rank} has not entered; "
    if unheard:
        return f"{text}nothing was heard of node {job.nodes[node]} for {trace.clocks.silent_s[node]:.1f} s"
    phase = str(signs.phase[rank])
    text += f"its process is {STATES[int(signs.state[rank])]}"
    if phase and np.isfinite(signs.beat_s[rank]):
        silent_s = float(trace.clocks.now_s[node] - signs.beat_s[rank])
        text += f", silent for {silent_s:.1f} s in phase {phase} of step {int(signs.step[rank])}"
    own = np.flatnonzero(calls.rank == rank)
    if len(own):
        last = int(own[calls.enter_s[own].argmax()])
        text += f"; it last entered {calls.name(last)}"
    else:
        text += "; it has not entered a collective"
    return text


def _ruled_out(waits: Waits, rank: int, state: int, unheard: bool) -> tuple[str, ...]:
    told = []
    victims = sorted(one for one in waits.awaited_s if waits.is_waiting[one])
    if victims:
        told.append(f"ranks {named(victims)}: awaited too, but they wait themselves")
    if not waits.is_waiting[rank] and not unheard:
        told.append(f"the network: rank {rank} is inside no collective that could be stuck")
    if state not in (STOPPED, DEAD) and not unheard:
        told.append("the end of its process: it runs")
    return tuple(told)
