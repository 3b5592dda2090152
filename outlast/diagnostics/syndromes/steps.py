"""Where each rank's time goes, step by step: how long it works between its calls, which no wait of its peers hides.

While one rank computes for longer, its peers wait inside the next collective for as long, so that the steps of all of
them last equally long. The time outside calls is longer for the one alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.syndromes.flow import Flow
from outlast.diagnostics.syndromes.trace import Floats, Ints, Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTimes:
    """Of the steps that a trace has in full."""

    steps: Ints
    """[steps], ascending."""
    own_s: Floats
    """[ranks, steps]: time outside calls that it waits for; NaN where a rank's step is not known in full."""
    step_s: Floats
    """[ranks, steps]: from the first call of a step to the first of the next one; NaN likewise."""

    @property
    def median_step_s(self) -> float:
        """0 where no step is known."""
        return float(np.nanmedian(self.step_s)) if np.isfinite(self.step_s).any() else 0.0

    def p99_step_s(self) -> float:
        """The 99th percentile over the steps of their median rank; 0 where none is known."""
        if not np.isfinite(self.step_s).any():
            return 0.0
        seen = self.step_s[:, np.isfinite(self.step_s).any(axis=0)]
        return float(np.percentile(np.nanmedian(seen, axis=0), 99))


def step_times(trace: Trace, flow: Flow) -> StepTimes:
    """Measure the steps of a trace.

    Args:
        trace: of the job. Where nobody knows when a call completed, the time in it counts as the rank's own.
        flow: how its ranks get from call to call.
    """
    calls, ranks = trace.calls, trace.job.world_size
    order = trace.order
    rank, step, enter = calls.rank[order], calls.step[order], calls.enter_s[order]
    if not len(order):
        empty = np.empty((ranks, 0))
        return StepTimes(steps=np.empty(0, dtype=np.int64), own_s=empty, step_s=empty)
    done = np.where(calls.pending[order], enter, calls.done_s[order])
    is_new = np.empty(len(order), dtype=np.bool_)
    is_new[0] = True
    is_new[1:] = (rank[1:] != rank[:-1]) | (step[1:] != step[:-1])
    firsts = np.flatnonzero(is_new)
    free = np.where(np.isfinite(flow.free_s), flow.free_s, calls.enter_s)[order]
    all_done = np.maximum.reduceat(done, firsts)
    # the first call of a step comes after all of the step before
    before = np.empty_like(enter)
    before[1:] = free[:-1]
    segment = np.cumsum(is_new) - 1
    before[firsts[1:]] = all_done[:-1]
    starts_rank = np.empty(len(firsts), dtype=np.bool_)
    starts_rank[0] = True
    starts_rank[1:] = rank[firsts[1:]] != rank[firsts[:-1]]
    before[firsts[starts_rank]] = np.nan
    own = np.bincount(segment, weights=np.maximum(enter - before, 0.0))
    lasts = np.append(enter[firsts[1:]], np.nan) - enter[firsts]
    lasts[np.append(starts_rank[1:], True)] = np.nan
    steps, column = np.unique(step[firsts], return_inverse=True)
    own_s, step_s = np.full((ranks, len(steps)), np.nan), np.full((ranks, len(steps)), np.nan)
    own_s[rank[firsts], column] = own
    step_s[rank[firsts], column] = lasts
    own_s[~np.isfinite(step_s)] = np.nan  # a step that goes on
    return StepTimes(steps=steps, own_s=own_s, step_s=step_s)


def median_over_ranks(values: Floats) -> Floats:
    """[steps]: of [ranks, steps]; NaN where none is known."""
    found = np.full(values.shape[1], np.nan)
    some = np.isfinite(values).any(axis=0)
    if some.any():
        found[some] = np.nanmedian(values[:, some], axis=0)
    return found
