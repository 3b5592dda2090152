"""A trace from what ranks leave in shared memory, as each node's launcher reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from outlast.diagnostics.live.flight import POINT_TO_POINT
from outlast.diagnostics.live.recorder import Collective
from outlast.diagnostics.live.stall import Observation
from outlast.diagnostics.syndromes.trace import DEAD, RUNNING, STOPPED, Calls, Clocks, Ints, Job, Signs, Trace
from outlast.errors import DiagnosticsError

_STATES = {"running": RUNNING, "stopped": STOPPED, "dead": DEAD}
_EVERYBODY = ("", "default_pg")
"""What the group of all ranks is called: by a recorder that knows one group, and in torch's description."""
ANY = -2


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """One node's ranks, as its launcher has observed them at one moment."""

    node: str
    now_s: float
    """CLOCK_MONOTONIC seconds of the node, when they were observed."""
    ranks: Sequence[Observation]
    """As :func:`outlast.diagnostics.live.observe` returns them."""
    ahead_s: float = 0.0
    """How far its clock is ahead of the collector's."""
    error_s: float = 0.0
    """By how much that may be wrong, at most. Infinity where it was never compared."""
    silent_s: float = 0.0
    """Seconds since this was heard, on the collector's clock."""
    excused_s: float = 0.0
    """Seconds until ``now_s`` in which its launcher did not run."""


def trace_of(
    views: Sequence[NodeView],
    *,
    world_size: int,
    groups: Mapping[str, Sequence[int]] | None = None,
    roles: Mapping[int, str] | None = None,
) -> Trace:
    """The trace of a job from all of its nodes.

    Args:
        views: of every node, also of those that were not heard of lately.
        world_size: how many ranks the job has.
        groups: by name, the ranks of process groups. Of others, the ranks that were seen in them: so one that has never
            entered a group is not waited for there. The default group has all ranks.
        roles: by rank; without, all ranks do the same work.

    Raises:
        DiagnosticsError: a rank is on two nodes, or ranks are missing: nodes that have never told their ranks must not
            be judged by.
    """
    ranks = [(one, at) for at, view in enumerate(views) for one in view.ranks]
    numbers = sorted(one.rank for one, _ in ranks)
    if numbers != list(range(world_size)):
        absent = sorted(set(range(world_size)) - set(numbers))
        raise DiagnosticsError(
            f"{len(views)} nodes do not show the {world_size} ranks of one job: "
            + (f"ranks {absent[:8]} are missing" if absent else f"there are {len(numbers)}, some on two nodes"),
            "give one view of each node, of one generation",
        )
    ranks.sort(key=lambda item: item[0].rank)
    records = [(one.rank, record) for one, _ in ranks if one.ring is not None for record in one.ring.records]
    members = _members(records, world_size, groups or {})
    index = {name: at for at, name in enumerate(members)}
    role_names = sorted({(roles or {}).get(rank, "") for rank in range(world_size)})
    job = Job(
        nodes=tuple(view.node for view in views),
        node_of=np.asarray([at for _, at in ranks], dtype=np.int64),
        roles=tuple(role_names),
        role_of=np.asarray(
            [role_names.index((roles or {}).get(rank, "")) for rank in range(world_size)], dtype=np.int64
        ),
        groups=tuple(members),
        members=tuple(members.values()),
    )
    return Trace(
        job=job,
        calls=_calls(records, index, members),
        signs=_signs([one for one, _ in ranks]),
        clocks=Clocks(
            now_s=np.asarray([view.now_s for view in views]),
            ahead_s=np.asarray([view.ahead_s for view in views]),
            error_s=np.asarray([view.error_s for view in views]),
            silent_s=np.asarray([view.silent_s for view in views]),
            excused_s=np.asarray([view.excused_s for view in views]),
        ),
    )


def _members(
    records: Sequence[tuple[int, Collective]], world_size: int, groups: Mapping[str, Sequence[int]]
) -> dict[str, Ints]:
    seen: dict[str, set[int]] = {}
    for rank, record in records:
        seen.setdefault(record.group, set()).add(rank)
    found = {}
    for name in sorted(seen):
        if name in groups:
            found[name] = np.asarray(sorted(groups[name]), dtype=np.int64)
        elif name == _EVERYBODY[0] or name.split(" ")[-1] == _EVERYBODY[1]:
            found[name] = np.arange(world_size)
        else:
            found[name] = np.asarray(sorted(seen[name]), dtype=np.int64)
    return found


def _calls(records: Sequence[tuple[int, Collective]], index: Mapping[str, int], members: Mapping[str, Ints]) -> Calls:
    ops: dict[str, int] = {}
    rows = [
        (
            rank,
            index[one.group],
            one.number,
            ops.setdefault(one.op, len(ops)),
            one.nbytes,
            one.step,
            _peer(one, members),
        )
        for rank, one in records
    ]
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 7)
    return Calls(
        rank=columns[:, 0],
        group=columns[:, 1],
        seq=columns[:, 2],
        op=columns[:, 3],
        nbytes=columns[:, 4],
        dtype=np.zeros(len(columns), dtype=np.int64),
        step=columns[:, 5],
        enter_s=np.asarray([one.entered_s for _, one in records]),
        done_s=np.asarray([np.nan if one.completed_s is None else one.completed_s for _, one in records]),
        peer=columns[:, 6],
        ops=tuple(ops),
    )


def _peer(one: Collective, members: Mapping[str, Ints]) -> int:
    """The rank, in the job, of the other side of a point-to-point operation; ANY if that is not known."""
    if not one.group.startswith(POINT_TO_POINT):
        return -1
    word = one.op.rsplit(" ", 1)[-1]
    if not word.isdecimal():
        return ANY
    base = one.group.removeprefix(POINT_TO_POINT)
    of = [ranks for name, ranks in members.items() if name == base or name.startswith(f"{base} ")]
    place = int(word)
    if of:
        return int(of[0][place]) if place < len(of[0]) else ANY
    return place if base in ("", "0") else ANY  # torch's name of the default group, in which ranks are the job's


def _signs(ranks: Sequence[Observation]) -> Signs:
    return Signs(
        state=np.asarray([_STATES[one.state] for one in ranks], dtype=np.int64),
        phase=np.asarray([one.beat.phase if one.beat is not None else "setup" for one in ranks]),
        step=np.asarray([one.step for one in ranks], dtype=np.int64),
        beat_s=np.asarray([np.nan if one.beat is None else one.beat.t_s + one.excused_s for one in ranks]),
        idle_s=np.asarray([one.idle_s for one in ranks]),
    )
