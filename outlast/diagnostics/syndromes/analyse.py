"""All syndromes of one trace, the worst first."""

from __future__ import annotations

from collections.abc import Sequence

from outlast.diagnostics.syndromes.crash import Ended, find_first
from outlast.diagnostics.syndromes.facts import Fact
from outlast.diagnostics.syndromes.hang import find_hangs
from outlast.diagnostics.syndromes.meetings import meetings_of
from outlast.diagnostics.syndromes.numerical import find_not_finite
from outlast.diagnostics.syndromes.order import find_mismatch
from outlast.diagnostics.syndromes.rules import Rules
from outlast.diagnostics.syndromes.slow import find_slow
from outlast.diagnostics.syndromes.slow_links import find_slow_communication
from outlast.diagnostics.syndromes.steps import StepTimes, step_times
from outlast.diagnostics.syndromes.trace import Trace
from outlast.diagnostics.syndromes.verdict import Verdict
from outlast.diagnostics.syndromes.waits import waits_of


def analyse(
    trace: Trace, *, facts: Sequence[Fact] = (), ends: Sequence[Ended] = (), rules: Rules | None = None
) -> tuple[Verdict, ...]:
    """What is wrong, and with whom. Empty while all is well, or is explained by what all ranks do at once.

    While ranks stand still, or have ended, only that is told: that they were slow before explains nothing. Verdicts
    are of one moment; :mod:`outlast.diagnostics.syndromes.restraint` says which are to be believed. Takes less than 2 s
    for 4,096 ranks with 200 calls each.

    Args:
        trace: what is known of the job's newest steps.
        facts: what the nodes' monitors have seen meanwhile.
        ends: of ranks that have ended by themselves.
        rules: from when on something counts.
    """
    rules = rules or Rules()
    meetings = meetings_of(trace)
    waits = waits_of(trace, meetings, node_silent_s=rules.node_silent_s)
    numbers = find_not_finite(trace, facts)
    mismatch = find_mismatch(trace, meetings)
    if mismatch is not None:
        return mismatch, *numbers
    first = find_first(trace, waits, ends)
    if first is not None:
        return first, *numbers
    times = step_times(trace, waits.flow)
    hangs = find_hangs(trace, waits, rules, step_limit_s(times, rules), facts)
    if hangs:
        return *numbers, *hangs
    slow = find_slow(trace, meetings, times, rules, facts)
    return *numbers, *slow, *find_slow_communication(trace, meetings, times, rules)


def step_limit_s(times: StepTimes, rules: Rules) -> float:
    """How long its peers wait for a rank in a step; before a step is known, as long as they do in set-up."""
    typical_s = times.p99_step_s()
    phases = rules.phases
    return max(phases.floor_s, phases.factor * typical_s) if typical_s > 0 else phases.startup_limit_s
