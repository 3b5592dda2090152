"""Which ranks of a start have failed, and which of them is the first cause."""

from __future__ import annotations

import time
from collections.abc import Mapping

from outlast.launch.failures import RankFailure
from outlast.launch.hang_watch import HangWatch
from outlast.launch.processes import RankProcesses

CAUSE_S = 1.0
"""How long, once a rank has failed because it lost a peer, the others may take to say what happened to them."""


def find_failures(
    processes: RankProcesses,
    watch: HangWatch | None,
    *,
    hang_evidence: Mapping[int, str],
    ended: Mapping[int, int],
    says_finish: bool,
) -> list[RankFailure]:
    """The ranks that failed, the likely cause first; empty while none has.

    A victim may end before the rank that it has lost, which is still closing; that one gets ``CAUSE_S`` to end, so that
    its own words are heard.

    Args:
        processes: this node's ranks.
        watch: of them, if there is one.
        hang_evidence: of each rank that was killed because it hung.
        ended: the process of each rank that had ended before its wrapper was killed.
        says_finish: whether each rank says so in its heartbeat before it ends well, as outlast's trainer does.
    """
    deadline_s = time.monotonic() + CAUSE_S
    while True:
        early = find_early(processes, watch, says_finish=says_finish)
        failures = processes.failures(hang_evidence, ended, early)
        victims = bool(failures) and all(failure.lost_peer for failure in failures)
        if not victims or not processes.running() or time.monotonic() > deadline_s:
            return failures
        time.sleep(CAUSE_S / 20)


def find_early(processes: RankProcesses, watch: HangWatch | None, *, says_finish: bool) -> dict[int, str]:
    """Where ranks were that exited with status 0 and so are the cause of what their peers suffer.

    A program that beats may end without saying that it finishes. So this is held against a rank only if its peers fail,
    or wait for longer than they may; or at once where every rank says so.
    """
    statuses = processes.statuses()
    if watch is None or 0 not in statuses.values():
        return {}
    early = watch.ended_early(rank for rank, status in statuses.items() if status == 0)
    if not early or says_finish or any(statuses.values()):
        return early
    return early if watch.is_stuck(processes.running()) else {}
