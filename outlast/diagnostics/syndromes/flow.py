"""What each rank waits for before it goes on to its next call: the one before, all that are pending, or nothing.

Nothing in a record says so, but the times do. Where a rank waits, its next call follows the end of what it waits for by
the same time in every step. Where it goes on, as DDP does from bucket to bucket, it so follows the begin of the call
before. The last bucket of a backward pass is pending like the others, but before the next call, say for the norm of
the gradients, all of them are waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.syndromes.trace import Bools, Calls, Floats, Ints, Trace

OVERLAP_SHARE = 0.1
"""A rank does not wait for what is still pending, this often, when it enters its next call."""
STEADIER = 0.8
"""It waits for something else than the call before, or for nothing, if that spreads so much less."""
LEAST_PAIRS = 20
GRAIN_S = 1e-5
"""Times are not told apart more finely."""
MOST_RANKS = 256
"""Ranks whose calls are looked at; others are taken to be alike."""
NOTHING, THE_CALL, ALL, ALL_BEFORE = range(4)
"""What may be waited for after a call: nothing; it; all that are pending; those that were called before it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Flow:
    """How ranks get from call to call."""

    goes_on: Bools
    """[calls]: whether its rank went on to its next call without waiting for it."""
    free_s: Floats
    """[calls]: from when on its rank was free to do what leads to its next call; infinity while it is not."""


def flow_of(trace: Trace) -> Flow:
    """What each rank waits for, by what ranks did so far at such places.

    Places are alike if the call and the next one are of the same kinds: operation, bytes, size of the group, inside a
    node or across nodes. The newest call of a rank, which has no next one yet, is taken to be as most of its kind are.
    Of places that are too rare to tell, ranks are taken to wait for the call. By the end of a step all are waited for.
    """
    calls, order = trace.calls, trace.order
    goes_on = np.zeros(len(calls), dtype=np.bool_)
    if not len(calls):
        return Flow(goes_on=goes_on, free_s=np.empty(0))
    kind, kinds = _kinds(trace)
    rank, step = calls.rank[order], calls.step[order]
    same = np.flatnonzero((rank[1:] == rank[:-1]) & (step[1:] == step[:-1]))
    one, after = order[same], order[same + 1]
    place = kind[one] * kinds + kind[after]
    until_s = _pending_until(trace)
    before_s = np.full(len(calls), -np.inf)
    before_s[order[1:]] = np.where(rank[1:] == rank[:-1], until_s[order[:-1]], -np.inf)
    done_s = np.where(calls.pending, np.inf, calls.done_s)
    ends = np.stack([calls.enter_s, done_s, until_s, before_s])
    chosen = np.flatnonzero(_sample(trace.job.world_size)[calls.rank[one]] & calls.timed[one])
    waits_for = _places(calls, one[chosen], after[chosen], place[chosen], ends[:, one[chosen]], same[chosen], kinds**2)
    choice = np.full(len(calls), ALL)
    choice[one] = waits_for[place]
    free_s = np.maximum(np.take_along_axis(ends, choice[None, :], axis=0)[0], calls.enter_s)
    goes_on[one] = (choice[one] == NOTHING) | (choice[one] == ALL_BEFORE)
    total = np.bincount(kind[one], minlength=kinds)
    usual = np.bincount(kind[one], weights=goes_on[one], minlength=kinds) * 2 > np.maximum(total, 1)
    newest = order[np.append(rank[1:] != rank[:-1], True)]
    goes_on[newest] = usual[kind[newest]]
    return Flow(goes_on=goes_on, free_s=free_s)


def _pending_until(trace: Trace) -> Floats:
    """[calls]: when it, and all that its rank has called before it, had completed; infinity while one has not."""
    calls, order = trace.calls, trace.order
    rank = calls.rank[order]
    first = np.flatnonzero(np.append(True, rank[1:] != rank[:-1])) if len(order) else order
    began = np.repeat(calls.enter_s[order][first], np.diff(np.append(first, len(order))))
    done = np.where(calls.pending[order], np.inf, calls.done_s[order]) - began
    # one running maximum for all ranks: those of the next one lie above
    span = float(np.max(done, where=np.isfinite(done), initial=0.0)) + 1.0
    place = np.cumsum(np.append(0, np.diff(rank) != 0)) if len(order) else rank
    finite = np.where(np.isfinite(done), done, span)
    highest = np.maximum.accumulate(finite + place * (2 * span)) - place * (2 * span)
    found = np.empty(len(calls))
    found[order] = np.where(highest >= span, np.inf, highest + began)
    return found


def _kinds(trace: Trace) -> tuple[Ints, int]:
    """[calls]: the kind of each, and how many there are."""
    calls, job = trace.calls, trace.job
    sizes = np.asarray([len(ranks) for ranks in job.members], dtype=np.int64)
    size = (np.log2(calls.nbytes + 1.0) * 10).astype(np.int64)
    where = sizes[calls.group] * 2 + job.is_across[calls.group]
    codes, kind = np.unique((where * len(calls.ops) + calls.op) * 1000 + size, return_inverse=True)
    return kind.astype(np.int64), len(codes)


def _sample(world_size: int) -> Bools:
    """[ranks]: spread out, and not always at the same place of a node."""
    chosen = np.ones(world_size, dtype=np.bool_)
    if world_size > MOST_RANKS:
        sample = np.arange(MOST_RANKS)
        chosen[:] = False
        chosen[(sample * world_size // MOST_RANKS + sample * 7) % world_size] = True
    return chosen


def _places(calls: Calls, one: Ints, after: Ints, place: Ints, ends: Floats, at: Ints, places: int) -> Ints:
    """[places]: what ranks wait for there.

    Args:
        calls: of the trace.
        one: [pairs]: a call of a sampled rank.
        after: [pairs]: the next one of the rank, in the same step.
        place: [pairs]: the kind of place.
        ends: [what, pairs]: when each of what may be waited for had ended.
        at: [pairs]: where the pair is in the order of ranks and times.
        places: how many kinds of places there are.
    """
    enter_s = calls.enter_s[after]
    # the how-manieth of its kind in its step, so that steps can be compared
    key = (calls.rank[one] * places + place) * (int(calls.step.max()) + 1) + calls.step[one]
    order = np.lexsort((at, key))
    first = np.append(True, np.diff(key[order]) != 0) if len(order) else np.zeros(0, dtype=np.bool_)
    number = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    again = np.lexsort((calls.step[one[order]], number, place[order], calls.rank[one[order]]))
    order, number = order[again], number[again]
    same = np.stack([calls.rank[one[order]], place[order], number])
    alike = (same[:, 1:] == same[:, :-1]).all(axis=0)
    which = place[order][1:][alike]
    count, total = np.bincount(which, minlength=places), np.bincount(place, minlength=places)
    spread = np.full((len(ends), places), np.inf)
    for what, end_s in enumerate(ends):
        over = np.bincount(place[enter_s < end_s - GRAIN_S], minlength=places) > OVERLAP_SHARE * np.maximum(total, 1)
        rest = (enter_s - np.maximum(end_s, calls.enter_s[one]))[order]
        with np.errstate(invalid="ignore"):
            found = _medians(np.abs(np.diff(rest))[alike], which, places)
        spread[what] = np.where(over | np.isnan(found), np.inf, found)
    usual = np.where(np.isfinite(spread[THE_CALL]) | (count < LEAST_PAIRS), THE_CALL, NOTHING)
    best = spread.argmin(axis=0)
    least, default = spread.min(axis=0), spread[usual, np.arange(places)]
    chosen: Ints = np.where((count >= LEAST_PAIRS) & (least < STEADIER * default), best, usual)
    return chosen


def _medians(values: Floats, kind: Ints, kinds: int) -> Floats:
    """[kinds]: of the values of each; NaN of none."""
    order = np.lexsort((values, kind))
    counts = np.bincount(kind, minlength=kinds)
    middle = np.cumsum(counts) - counts + counts // 2
    found = np.full(kinds, np.nan)
    some = counts > 0
    found[some] = values[order][middle[some]]
    return found
