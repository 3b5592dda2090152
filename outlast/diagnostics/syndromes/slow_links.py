"""All arrive in time, and what they exchange takes longer: which link, or whose adapter."""

from __future__ import annotations

import numpy as np

from outlast.diagnostics.syndromes.links import delay_matrix, find_hot
from outlast.diagnostics.syndromes.meetings import Meetings
from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.shift import Shifts, find_shifts
from outlast.diagnostics.syndromes.steps import StepTimes, median_over_ranks
from outlast.diagnostics.syndromes.trace import Floats, Ints, Trace
from outlast.diagnostics.syndromes.verdict import Culprit, Verdict


def find_slow_communication(trace: Trace, meetings: Meetings, times: StepTimes, rules: Rules) -> list[Verdict]:
    """Groups whose collectives take 10 % of a step longer than before, or than other groups', once all have entered.

    The link or node is told from the delay matrix where messages are known, else from what slow groups have in common
    that others do not have.
    """
    step_s = times.median_step_s
    known = times.steps >= rules.slow_warmup_steps
    if known.sum() < rules.slow_steps or step_s <= 0:
        return []
    threshold_s = max(rules.slow_share * step_s, rules.slow_least_s)
    steps = times.steps[known]
    series = _by_group(trace, meetings, steps)
    shifts, hot = _slow_groups(trace, meetings, series, threshold_s, rules)
    whole = find_shifts(median_over_ranks(times.step_s[:, known])[None, :], threshold_s, rules, from_start=False)
    if not len(hot) and not whole.found[0]:
        return []
    at = int(shifts.at[hot].min()) if len(hot) else int(whole.at[0])
    first = int(steps[at])
    began = trace.calls.step == first
    began_s = float(trace.common_s(trace.calls.rank[began], trace.calls.enter_s[began]).min())
    usual = _before(trace, began_s) if at else None
    found = find_hot(delay_matrix(trace, began_s), trace.job.nodes, rules.link_factor, usual)
    if found is None and not len(hot):
        return []
    group = int(hot[np.argmax(shifts.after[hot] - shifts.before[hot])]) if len(hot) else -1
    rise_s = float((shifts.after - shifts.before)[group]) if group >= 0 else float((whole.after - whole.before)[0])
    common = _in_common(trace, hot)
    if found is not None:
        culprit = found.culprit
    elif common is not None:
        culprit = common
    else:
        ranks = tuple(map(int, trace.job.members[group]))
        culprit = Culprit(place="group", ranks=ranks, role=trace.job.groups[group])
    what = (
        f"collectives of group {trace.job.groups[group]} take {rise_s * 1e3:.0f} ms a step longer once all have entered"
        if group >= 0
        else f"steps take {rise_s * 1e3:.0f} ms longer"
    )
    more = f", and those of {len(hot) - 1} other groups" if len(hot) > 1 else ""
    return [
        Verdict(
            syndrome="communication_slow",
            culprit=culprit,
            evidence=(
                f"{what}{more}, {rise_s / step_s:.0%} of a step, "
                f"{f'since step {first}' if at else 'in all steps seen'}{f'; {found.words}' if found else ''}"
            ),
            ruled_out=("late ranks: the time counts from when the last one has entered",),
            confidence="likely" if found is not None or common is not None else "weak",
            step=first,
            cost_s=rise_s,
        )
    ]


def _by_group(trace: Trace, meetings: Meetings, steps: Ints) -> Floats:
    """[groups, steps]: seconds from the last rank's arrival to the end, of all collectives of a step; NaN if none."""
    groups = len(trace.job.groups)
    series = np.full((groups, len(steps)), np.nan)
    used = np.flatnonzero(meetings.measured)
    if not len(used) or not len(steps):
        return series
    step = trace.calls.step[meetings.rows[meetings.starts[used]]]
    at = np.minimum(np.searchsorted(steps, step), len(steps) - 1)
    fits = steps[at] == step
    used, at = used[fits], at[fits]
    cell = meetings.group[used] * len(steps) + at
    total = np.bincount(cell, weights=meetings.transfer_s[used], minlength=series.size)
    count = np.bincount(cell, minlength=series.size)
    found: Floats = np.where(count > 0, total, np.nan).reshape(series.shape)
    return found


def _slow_groups(
    trace: Trace, meetings: Meetings, series: Floats, threshold_s: float, rules: Rules
) -> tuple[Shifts, Ints]:
    """Against their own past, and against groups of the same size that exchange as much in the same way."""
    past = find_shifts(series - _median_of_rows(series), threshold_s, rules, from_start=False)
    compared = np.full_like(series, np.nan)
    for like in _alike(trace, meetings):
        if len(like) >= 3:
            ordered = np.sort(series[like], axis=0)
            known = np.isfinite(series[like]).sum(axis=0)
            middle = ordered[np.maximum((known - 1) // 2, 0), np.arange(series.shape[1])]
            compared[like] = series[like] - middle
    peers = find_shifts(compared, threshold_s, rules, from_start=True)
    chosen = past if past.found.any() else peers
    return chosen, np.flatnonzero(chosen.found)


def _median_of_rows(values: Floats) -> Floats:
    found = np.full((len(values), 1), np.nan)
    some = np.isfinite(values).any(axis=1)
    if some.any():
        found[some] = np.nanmedian(values[some], axis=1, keepdims=True)
    return found


def _alike(trace: Trace, meetings: Meetings) -> list[Ints]:
    """Groups that may be compared: as many ranks, on one node or on several, with as many bytes a call."""
    groups = len(trace.job.groups)
    calls = trace.calls
    used = calls.collective
    count = np.bincount(calls.group[used], minlength=groups)
    total = np.bincount(calls.group[used], weights=calls.nbytes[used], minlength=groups)
    mean = np.round(np.log2(np.maximum(total / np.maximum(count, 1), 1.0)) * 2)
    kinds: dict[tuple[int, bool, float, int], list[int]] = {}
    for group, ranks in enumerate(trace.job.members):
        if count[group]:
            stage = int(trace.job.role_of[ranks[0]])
            kinds.setdefault((len(ranks), bool(trace.job.is_across[group]), float(mean[group]), stage), []).append(
                group
            )
    return [np.asarray(one) for one in kinds.values()]


def _before(trace: Trace, until_s: float) -> Floats:
    """[nodes, nodes]: the delay matrix of what was begun earlier."""
    links = trace.links
    keep = trace.common_s(links.source, links.begin_s) < until_s
    earlier = type(links)(
        source=links.source[keep],
        target=links.target[keep],
        nbytes=links.nbytes[keep],
        begin_s=links.begin_s[keep],
        done_s=links.done_s[keep],
    )
    return delay_matrix(
        Trace(job=trace.job, calls=trace.calls, signs=trace.signs, clocks=trace.clocks, links=earlier), -np.inf
    )


def _in_common(trace: Trace, hot: Ints) -> Culprit | None:
    """The one node, or the one pair of nodes, that all slow groups use and no other group that has several nodes."""
    job = trace.job
    if not len(hot):
        return None
    uses = np.zeros((len(job.groups), len(job.nodes)), dtype=np.bool_)
    for group, ranks in enumerate(job.members):
        uses[group, job.node_of[ranks]] = True
    others = np.setdiff1d(np.flatnonzero(job.is_across), hot)
    both = np.flatnonzero(uses[hot].all(axis=0))
    alone = [node for node in both.tolist() if not uses[others, node].any()]
    if len(alone) == 1:
        return Culprit(place="node", nodes=(job.nodes[alone[0]],), ranks=tuple(map(int, job.ranks_on(alone[0]))))
    pairs = [
        (one, other)
        for at, one in enumerate(both.tolist())
        for other in both.tolist()[at + 1 :]
        if not (uses[others, one] & uses[others, other]).any()
    ]
    if len(pairs) == 1:
        return Culprit(place="link", nodes=(job.nodes[pairs[0][0]], job.nodes[pairs[0][1]]))
    return None
