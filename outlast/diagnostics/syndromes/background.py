"""Which calls a rank waits for, and which it leaves in the background while it goes on, as DDP does with its buckets.

Nothing in a record says so, but the times do. Where a rank waits, what comes next follows the call's end by the same
time in every step; where it goes on, it follows the call's begin so.
"""

from __future__ import annotations

import numpy as np

from outlast.diagnostics.syndromes.trace import Bools, Calls, Floats, Ints, Trace

OVERLAP_SHARE = 0.1
"""Calls that are still pending, this often, when their rank enters its next one, are in the background."""
STEADIER = 0.8
"""So are those after whose begin the next call follows with so much less spread than after their end."""
LEAST_PAIRS = 20
MOST_RANKS = 256
"""Ranks whose calls are looked at; others of the same kind are taken to be alike."""


def background_calls(trace: Trace) -> Bools:
    """[calls]: whether its rank goes on meanwhile, by what calls of its kind did so far.

    Calls are of a kind if they are the same operation on as many bytes in groups of the same size, inside a node or
    across nodes. Of kinds that are too rare to tell, ranks are taken to wait for them.
    """
    calls, job = trace.calls, trace.job
    if not len(calls):
        return np.zeros(0, dtype=np.bool_)
    sizes = np.asarray([len(ranks) for ranks in job.members], dtype=np.int64)
    size_code = np.log2(np.maximum(calls.nbytes, 1) + 1).round(1) * 10
    where = sizes[calls.group] * 2 + job.is_across[calls.group]
    code = (where * len(calls.ops) + calls.op) * 1000 + size_code.astype(np.int64)
    codes, kind = np.unique(code, return_inverse=True)
    chosen = np.ones(job.world_size, dtype=np.bool_)
    if job.world_size > MOST_RANKS:  # spread out, and not always at the same place of a node
        sample = np.arange(MOST_RANKS)
        chosen[:] = False
        chosen[(sample * job.world_size // MOST_RANKS + sample * 7) % job.world_size] = True
    rows = np.flatnonzero(chosen[calls.rank])
    rows = rows[np.lexsort((calls.enter_s[rows], calls.rank[rows]))]
    found: Bools = _kinds(calls, rows, kind, len(codes))[kind]
    return found


def _kinds(calls: Calls, rows: Ints, kind: Ints, kinds: int) -> Bools:
    """[kinds]: whether calls of it are in the background, by these rows, ordered by rank and time."""
    rank, step = calls.rank[rows], calls.step[rows]
    same = (rank[1:] == rank[:-1]) & (step[1:] == step[:-1])
    is_first = np.append(True, ~same)
    place = np.arange(len(rows)) - np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0))
    one, after = rows[:-1][same], rows[1:][same]
    known = calls.timed[one] | calls.pending[one]
    one, after, place = one[known], after[known], place[:-1][same][known]
    done_s = np.where(calls.pending[one], np.inf, calls.done_s[one])
    total = np.bincount(kind[one], minlength=kinds)
    over = np.bincount(kind[one][calls.enter_s[after] < done_s], minlength=kinds)
    ended = np.isfinite(done_s)
    one, after, place = one[ended], after[ended], place[ended]
    order = np.lexsort((calls.step[one], place, kind[one], calls.rank[one]))
    one, after, place = one[order], after[order], place[order]
    key = np.stack([calls.rank[one], kind[one], place])
    alike = (key[:, 1:] == key[:, :-1]).all(axis=0)
    from_begin = np.abs(np.diff(calls.enter_s[after] - calls.enter_s[one]))[alike]
    from_end = np.abs(np.diff(calls.enter_s[after] - calls.done_s[one]))[alike]
    which = kind[one][1:][alike]
    steadier = (_medians(from_begin, which, kinds) < STEADIER * _medians(from_end, which, kinds)) & (
        np.bincount(which, minlength=kinds) >= LEAST_PAIRS
    )
    found: Bools = (over > OVERLAP_SHARE * np.maximum(total, 1)) | steadier
    return found


def _medians(values: Floats, kind: Ints, kinds: int) -> Floats:
    """[kinds]: of the values of each; NaN of none."""
    order = np.lexsort((values, kind))
    counts = np.bincount(kind, minlength=kinds)
    middle = np.cumsum(counts) - counts + counts // 2
    found = np.full(kinds, np.nan)
    some = counts > 0
    found[some] = values[order][middle[some]]
    return found
