"""One rank, node or role takes longer outside communication, and the others wait for it, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.syndromes.causes import Cause, explain
from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.meetings import Meetings
from outlast.diagnostics.syndromes.others import median_of_others
from outlast.diagnostics.syndromes.places import whole_nodes
from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.shift import Shifts, find_shifts, recurring
from outlast.diagnostics.syndromes.steps import StepTimes, median_over_ranks
from outlast.diagnostics.syndromes.trace import Bools, Floats, Ints, Trace
from outlast.diagnostics.syndromes.verdict import Confidence, Culprit, Verdict

MOST_NAMED = 8
HELD_SHARE = 0.5
"""Its peers must wait for it for this share of its extra time; else its slowness costs nobody anything."""

PAST_PERCENTILE = 20.0
"""What a role took before it became slow, though it may have been slow in most of the steps seen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Excess:
    """How much longer than its role each rank worked. ``values`` is [ranks, steps], seconds."""

    values: Floats
    has_peers: Bools
    """[ranks]: whether others have its role; else it is compared with its own past."""
    steps: Ints
    step_s: float
    threshold_s: float


def find_slow(trace: Trace, meetings: Meetings, times: StepTimes, rules: Rules, facts: Sequence[Fact]) -> list[Verdict]:
    """Who has become slow, or is slower than the others of its role, by 10 % of a step or more.

    Args:
        trace: of the job.
        meetings: of the trace.
        times: its steps.
        rules: from when on that counts.
        facts: what the nodes' monitors have seen.
    """
    excess = excess_of(trace, times, rules)
    if excess is None:
        return []
    with_peers = find_shifts(excess.values, excess.threshold_s, rules, from_start=True)
    alone = find_shifts(excess.values, excess.threshold_s, rules, from_start=False)
    # one that was faster than its one peer, and is so no more, has not become slow: the peer has healed
    above = with_peers.after >= excess.threshold_s
    found = np.where(excess.has_peers, with_peers.found & above, alone.found)
    held_s = _held_s(trace, meetings, excess.steps)
    slow = np.flatnonzero(found)
    needed_s = excess.threshold_s * (1.0 - with_peers.at / max(excess.values.shape[1], 1))
    verdicts = [
        _verdict(trace, ranks, place, excess, with_peers, held_s, facts, rules)
        for ranks, place in _places(trace, slow)
        # where its slowness holds nobody up, it costs nothing; where no collective tells, it is believed to
        if not held_s[ranks].mean(axis=1).sum() < HELD_SHARE * needed_s[ranks].max()
    ]
    often = np.flatnonzero(recurring(excess.values, excess.threshold_s, rules) & ~found & excess.has_peers)
    if 0 < len(often) <= max(1.0, rules.shared_share * trace.job.world_size):
        verdicts += [_irregular(trace, int(rank), excess, facts, rules) for rank in often[:MOST_NAMED]]
    return verdicts + _slow_roles(trace, times, excess, rules, facts, slow)


def excess_of(trace: Trace, times: StepTimes, rules: Rules) -> Excess | None:
    """How much longer than its role each rank worked; None while too few steps are known."""
    known = np.isfinite(times.own_s).sum(axis=0) * 2 > trace.job.world_size
    usable = np.flatnonzero(known & (times.steps >= rules.slow_warmup_steps))
    if len(usable) < rules.slow_steps:
        return None
    own = times.own_s[:, usable]
    step_s = times.median_step_s
    values = np.full_like(own, np.nan)
    has_peers = np.zeros(trace.job.world_size, dtype=np.bool_)
    for role in range(len(trace.job.roles)):
        ranks = np.flatnonzero(trace.job.role_of == role)
        if len(ranks) > 1:
            values[ranks] = own[ranks] - median_of_others(own[ranks].T).T
            has_peers[ranks] = True
        elif len(ranks):
            values[ranks] = own[ranks] - np.nanmedian(own[ranks], axis=1, keepdims=True)
    threshold_s = max(rules.slow_share * step_s, rules.slow_least_s)
    return Excess(values=values, has_peers=has_peers, steps=times.steps[usable], step_s=step_s, threshold_s=threshold_s)


def _held_s(trace: Trace, meetings: Meetings, steps: Ints) -> Floats:
    """[ranks, steps]: seconds for which a collective's first rank waited for this one, its last."""
    measured = np.flatnonzero(meetings.measured)
    shape = trace.job.world_size, len(steps)
    if not len(measured):
        return np.full(shape, np.nan)
    is_last = meetings.wait_s == np.repeat(meetings.transfer_s, meetings.entered)
    rows = np.flatnonzero(is_last & meetings.measured[meetings.of_row])
    row = meetings.rows[rows]
    column = np.minimum(np.searchsorted(steps, meetings.calls.step[row]), len(steps) - 1)
    known = steps[column] == meetings.calls.step[row]
    cell = (meetings.calls.rank[row] * len(steps) + column)[known]
    spread_s = meetings.spread_s[meetings.of_row[rows]][known]
    held = np.bincount(cell, weights=spread_s, minlength=shape[0] * shape[1]).astype(np.float64)
    return held.reshape(shape)


def _places(trace: Trace, slow: Ints) -> list[tuple[list[int], str]]:
    """Slow ranks by node, where most ranks of a node are; else one by one."""
    job = trace.job
    places: list[tuple[list[int], str]] = []
    if len(slow) * 2 > job.world_size:  # whoever is slow then, it is not the minority that could be at fault
        return []
    late = [int(rank) for rank in slow]
    nodes = whole_nodes(late, {rank: job.node(rank) for rank in range(job.world_size)}) if len(late) > 1 else {}
    places += [(ranks, "node") for ranks in nodes.values()]
    places += [([rank], "rank") for rank in late if job.node(rank) not in nodes]
    return places[:MOST_NAMED]


def _verdict(
    trace: Trace,
    ranks: list[int],
    place: str,
    excess: Excess,
    shifts: Shifts,
    held_s: Floats,
    facts: Sequence[Fact],
    rules: Rules,
) -> Verdict:
    job = trace.job
    rank = max(ranks, key=lambda one: float(shifts.after[one]))
    before_s = float(shifts.before[rank])
    rise_s = float(shifts.after[rank]) - (max(before_s, 0.0) if excess.has_peers[rank] else before_s)
    at = int(shifts.at[rank])
    first = int(excess.steps[at])
    length = excess.values.shape[1] - at
    cause = explain(trace, facts, ranks, rise_s, length, rules, since_step=first)
    role = f" of role {job.role(rank)}" if job.role(rank) else ""
    others = int((job.role_of == job.role_of[rank]).sum()) - len(ranks)
    than = (
        f"the {f'{others} other ranks' if others > 1 else 'other rank'}{role}" if excess.has_peers[rank] else "before"
    )
    since = f"since step {first}" if at else f"in all {length} steps seen"
    whose = f"node {job.node(rank)}: {len(ranks)} ranks, the slowest rank {rank}" if place == "node" else f"rank {rank}"
    held = (
        ""
        if np.isnan(held_s[rank]).any()
        else f"; its peers waited {held_s[rank, at:].mean() * 1e3:.0f} ms a step for it, the last to enter"
    )
    confidence: Confidence = "likely" if excess.has_peers[rank] else "weak"
    return Verdict(
        syndrome="non_communication_slow",
        culprit=Culprit(
            place="node" if place == "node" else "rank",
            ranks=tuple(ranks),
            nodes=(job.node(rank),),
        ),
        evidence=(
            f"{whose} works {rise_s * 1e3:.0f} ms a step longer than {than}, {rise_s / excess.step_s:.0%} of a step, "
            f"{since}, in {shifts.share[rank]:.0%} of them{held}"
        ),
        ruled_out=(
            f"a spike: {length} steps, the newest ones too",
            *(("its role: others of it do not take longer",) if excess.has_peers[rank] else ()),
            "the network: it is time outside collectives",
        ),
        confidence=confidence,
        step=first,
        cause=cause.words,
        cause_confidence=cause.confidence if cause.words else None,
        is_software=cause.is_software,
        cost_s=rise_s,
    )


def _irregular(trace: Trace, rank: int, excess: Excess, facts: Sequence[Fact], rules: Rules) -> Verdict:
    job = trace.job
    values = excess.values[rank]
    high = np.nan_to_num(values) > excess.threshold_s
    mean_s = float(np.where(high, np.nan_to_num(values), 0.0).mean())
    times = int(high.sum())
    cause = explain(trace, facts, [rank], mean_s, len(values), rules, since_step=int(excess.steps[0]))
    return Verdict(
        syndrome="non_communication_slow",
        culprit=Culprit(place="rank", ranks=(rank,), nodes=(job.node(rank),)),
        evidence=(
            f"rank {rank} works {float(values[high].mean()) * 1e3:.0f} ms longer than its role in {times} of "
            f"{len(values)} steps, {mean_s * 1e3:.0f} ms in the mean step"
        ),
        ruled_out=(f"a spike: it was so {times} times", "a steady cause: most of its steps are as long as others'"),
        confidence="likely" if cause.words else "weak",
        step=int(excess.steps[int(high.argmax())]),
        cause=cause.words,
        cause_confidence=cause.confidence if cause.words else None,
        is_software=cause.is_software,
        cost_s=mean_s,
    )


def _slow_roles(
    trace: Trace, times: StepTimes, excess: Excess, rules: Rules, facts: Sequence[Fact], slow: Ints
) -> list[Verdict]:
    """Roles of which all ranks have become slow, while other roles have not: no rank of theirs is at fault."""
    job = trace.job
    if len(job.roles) < 2:
        return []
    at = np.isin(times.steps, excess.steps)
    own = times.own_s[:, at]
    present = np.unique(job.role_of)
    medians = np.stack([median_over_ranks(own[job.role_of == role]) for role in present])
    past = np.nanpercentile(medians, PAST_PERCENTILE, axis=1, keepdims=True)
    more = medians - past
    shifts = find_shifts(
        more - median_of_others(more.T).T,  # what all roles have in common is the job's
        excess.threshold_s,
        rules,
        from_start=False,
    )
    verdicts = []
    for at_role in np.flatnonzero(shifts.found).tolist():
        role = int(present[at_role])
        ranks = np.flatnonzero(job.role_of == role)
        if len(ranks) < 2 or len(ranks) == job.world_size or np.isin(ranks, slow).any():
            continue
        rise_s = float(shifts.after[at_role] - shifts.before[at_role])
        first = int(excess.steps[int(shifts.at[at_role])])
        length = medians.shape[1] - int(shifts.at[at_role])
        cause: Cause = explain(trace, facts, [int(ranks[0])], rise_s, length, rules, since_step=first)
        verdicts.append(
            Verdict(
                syndrome="non_communication_slow",
                culprit=Culprit(place="role", ranks=tuple(map(int, ranks)), role=job.roles[role]),
                evidence=(
                    f"all {len(ranks)} ranks of role {job.roles[role]} work {rise_s * 1e3:.0f} ms a step longer since "
                    f"step {first}, {rise_s / excess.step_s:.0%} of a step, and other roles do not"
                ),
                ruled_out=("single ranks and nodes: all of the role are alike",),
                confidence="likely",
                step=first,
                cause=cause.words or "uneven work between roles",
                cause_confidence=cause.confidence if cause.words else "likely",
                is_software=True,
                cost_s=rise_s,
            )
        )
    return verdicts
