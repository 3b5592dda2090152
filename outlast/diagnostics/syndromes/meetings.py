"""Which calls of different ranks belong together: a collective meets where its group's ranks have entered it.

How late a rank is, is told without comparing clocks. The ranks of a collective that synchronises leave it at about the
same time, so that who waited least came last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from outlast.diagnostics.live.mismatch import EQUAL_BYTES
from outlast.diagnostics.syndromes.trace import Bools, Calls, Floats, Ints, Trace

N = TypeVar("N", Ints, Floats)

SYNCHRONISING = frozenset(
    (
        *("all_reduce", "allreduce", "all_gather", "allgather", "_all_gather_base", "all_gather_into_tensor"),
        *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor", "all_to_all", "alltoall", "barrier"),
    )
)
"""Collectives that no rank leaves before all have entered."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Meetings:
    """The collectives of a trace. ``rows`` lists the calls meeting by meeting."""

    calls: Calls
    rows: Ints
    """[collective calls]: indices of calls, ordered by group and position."""
    starts: Ints
    """[meetings]: where each begins in ``rows``."""
    sizes: Ints
    """[meetings]: how many ranks of the group have to enter."""

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def entered(self) -> Ints:
        """[meetings]: how many ranks have, as far as the trace goes back."""
        return np.diff(np.append(self.starts, len(self.rows)))

    @cached_property
    def of_row(self) -> Ints:
        """[rows]: the meeting of each."""
        return np.repeat(np.arange(len(self)), self.entered)

    @cached_property
    def group(self) -> Ints:
        return self.calls.group[self.rows[self.starts]]

    @cached_property
    def seq(self) -> Ints:
        return self.calls.seq[self.rows[self.starts]]

    @cached_property
    def pending(self) -> Ints:
        """[meetings]: ranks that are inside."""
        return self._sum(self.calls.pending[self.rows].astype(np.int64))

    @cached_property
    def measured(self) -> Bools:
        """[meetings]: all have entered and left, it is known when, and they left together."""
        synchronising = np.asarray([op in SYNCHRONISING for op in self.calls.ops], dtype=np.bool_)
        fit = self.calls.timed[self.rows] & synchronising[self.calls.op[self.rows]]
        several = self.sizes > 1
        found: Bools = several & (self.entered == self.sizes) & (self._sum(fit.astype(np.int64)) == self.sizes)
        return found

    @cached_property
    def wait_s(self) -> Floats:
        """[rows]: how long each rank was inside; NaN while it is, or where nobody knows."""
        calls, rows = self.calls, self.rows
        return np.where(calls.timed[rows], calls.done_s[rows] - calls.enter_s[rows], np.nan)

    @cached_property
    def transfer_s(self) -> Floats:
        """[meetings]: how long the last rank to enter was inside; NaN where it is not measured."""
        return np.where(self.measured, self._min(self.wait_s), np.nan)

    @cached_property
    def spread_s(self) -> Floats:
        """[meetings]: how long the first rank to enter had to wait for the last; NaN where it is not measured."""
        return np.where(self.measured, self._max(self.wait_s) - self._min(self.wait_s), np.nan)

    @cached_property
    def differ(self) -> Bools:
        """[meetings]: whether ranks have entered different collectives there, or different sizes or types."""
        code = self.codes
        unequal: Bools = self._min(code) != self._max(code)
        return unequal

    @cached_property
    def codes(self) -> Ints:
        """[rows]: equal where two calls may meet. Sizes count for collectives in which they must be equal."""
        calls, rows = self.calls, self.rows
        equal = np.asarray([op in EQUAL_BYTES for op in calls.ops], dtype=np.bool_)
        nbytes = np.where(equal[calls.op[rows]], calls.nbytes[rows], 0)
        return (nbytes * len(calls.ops) + calls.op[rows]) * len(calls.dtypes) + calls.dtype[rows]

    def rows_of(self, meeting: int) -> Ints:
        """Its calls."""
        start = int(self.starts[meeting])
        return self.rows[start : start + int(self.entered[meeting])]

    def _sum(self, values: Ints) -> Ints:
        total: Ints = np.add.reduceat(values, self.starts) if len(self) else np.empty(0, dtype=np.int64)
        return total

    def _min(self, values: N) -> N:
        return np.minimum.reduceat(values, self.starts) if len(self) else values[:0]

    def _max(self, values: N) -> N:
        return np.maximum.reduceat(values, self.starts) if len(self) else values[:0]


def meetings_of(trace: Trace) -> Meetings:
    """Match the collectives of all ranks by group and position. Takes about 0.2 s for a million calls."""
    calls = trace.calls
    rows = np.flatnonzero(calls.collective)
    span = int(calls.seq[rows].max(initial=0)) + 1
    key = calls.group[rows] * span + calls.seq[rows]
    order = np.argsort(key, kind="stable")
    rows, key = rows[order], key[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    counts = np.asarray([len(ranks) for ranks in trace.job.members], dtype=np.int64)
    sizes = counts[calls.group[rows[starts]]] if len(starts) else np.empty(0, dtype=np.int64)
    return Meetings(calls=calls, rows=rows, starts=starts, sizes=sizes)


def last_seq(trace: Trace) -> Ints:
    """[memberships, as in :attr:`Job.slots`]: the newest position that each rank has entered; -1 if none is known."""
    calls, job = trace.calls, trace.job
    rows = np.flatnonzero(calls.collective)
    at = np.searchsorted(job.slots, calls.group[rows] * job.world_size + calls.rank[rows])
    newest = np.full(len(job.slots), -1, dtype=np.int64)
    np.maximum.at(newest, at, calls.seq[rows])
    return newest
