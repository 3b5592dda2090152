"""Which ranks of a start have failed, and which of them is the first cause."""

from __future__ import annotations

import signal
import time
from collections.abc import Collection, Mapping, Sequence

from outlast.diagnostics.live.mismatch import find_mismatch
from outlast.launch.failures import RankFailure
from outlast.launch.hang_watch import HangWatch
from outlast.launch.processes import RankProcesses

CAUSE_S = 1.0
"""How long, once a rank has failed because it lost a peer, the others may take to say what happened to them."""

ABORTED_S = 5.0
"""The same once a rank has been aborted: its peers' newest collectives may tell that it was no fault of its own."""


def find_failures(
    processes: RankProcesses,
    watch: HangWatch | None,
    *,
    hang_evidence: Mapping[int, str],
    ended: Mapping[int, int],
    says_finish: bool,
    is_program: bool = False,
) -> list[RankFailure]:
    """The ranks that failed, the likely cause first; empty while none has.

    A victim may end before the rank that it has lost, which is still closing; that one gets ``CAUSE_S`` to end, so that
    its own words are heard. So do the peers of a rank that was aborted, which tell by their newest collectives who left
    the common order.

    Args:
        processes: this node's ranks.
        watch: of them, if there is one.
        hang_evidence: of each rank that was killed because it hung.
        ended: the process of each rank that had ended before its wrapper was killed.
        says_finish: whether each rank says so in its heartbeat before it ends well, as outlast's trainer does.
        is_program: whether the ranks run somebody's program, which ends well wherever it ends, in the middle of
            training too. That is held against a rank once its peers have lost it, or wait for it.
    """
    began_s = time.monotonic()
    while True:
        early = find_early(processes, watch, says_finish=says_finish, is_program=is_program)
        failures = processes.failures(hang_evidence, ended, early, {})
        if not failures:
            return []
        victims = all(failure.lost_peer for failure in failures)
        aborted = {failure.rank for failure in failures if failure.status == -signal.SIGABRT}
        limit_s = ABORTED_S if aborted and is_program else CAUSE_S if victims else 0.0
        running = processes.running()
        if aborted and is_program and watch is not None:  # who says that it finishes has left its collectives
            running = {rank: running[rank] for rank in watch.ended_early(running)}
        wait = bool(running) and time.monotonic() - began_s < limit_s
        if is_program and watch is not None and not early and not hang_evidence and (victims or aborted):
            early = watch.left_peers(rank for rank, status in processes.statuses().items() if status == 0)
            if early and victims:
                return processes.failures(hang_evidence, ended, early, {})
            desync = {} if wait else _find_desync(processes, watch, failures, aborted)
            if desync:
                return processes.failures(hang_evidence, ended, {}, desync)
        if not wait:
            return failures
        time.sleep(CAUSE_S / 20)


def _find_desync(
    processes: RankProcesses, watch: HangWatch, failures: Sequence[RankFailure], aborted: Collection[int]
) -> dict[int, str]:
    """The rank that left the order of collectives, and how that is known; empty if that is not why ranks failed."""
    if not all(failure.lost_peer or failure.rank in aborted for failure in failures):
        return {}
    rings = watch.last_rings(rank for rank in processes.statuses() if rank not in aborted)
    found = find_mismatch(rings, aborted, certain=any(failure.mismatched for failure in failures))
    return {} if found is None else {found.first: found.evidence}


def find_early(
    processes: RankProcesses, watch: HangWatch | None, *, says_finish: bool, is_program: bool
) -> dict[int, str]:
    """Where ranks were that exited with status 0 and so are the cause of what their peers suffer.

    A program that beats may end without saying that it finishes. So this is held against a rank only if its peers fail,
    or wait for longer than they may; or at once where every rank says so.
    """
    statuses = processes.statuses()
    if watch is None or 0 not in statuses.values():
        return {}
    well = [rank for rank, status in statuses.items() if status == 0]
    early = watch.ended_early(well)
    if (early and says_finish) or any(statuses.values()):
        return early
    if not watch.is_stuck(processes.running()):
        return {}
    return early or (watch.left_peers(well) if is_program else {})
