"""What the ranks' rings held when ranks failed, as events: shared memory is gone when the run is looked at later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from outlast.diagnostics.live.recorder import Collective, Ring
from outlast.events import Event, Record

NEWEST = 128
"""Collectives kept of each rank: with their texts about 12 KB a rank and failure."""

KeptRow = tuple[int, str, str, int, int, float, float | None, str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesKept(Event):
    """The newest collectives of one rank, as its ring held them when ranks of its start failed, before the peers of
    those that failed were ended. Times are seconds since the epoch."""

    kind: ClassVar[str] = "collectives_kept"
    of_rank: int
    pid: int
    entered: int
    """Collectives that the rank entered in this start, those that are not listed included."""
    newest: tuple[KeptRow, ...]
    """Oldest first. Of each: seq, op, label, bytes, step, entered, completed (null while it was under way), group, and
    the position in the group."""


def kept(ring: Ring, *, ahead_s: float) -> CollectivesKept:
    """The event of a ring.

    Args:
        ring: of a rank of this machine.
        ahead_s: the time of day minus CLOCK_MONOTONIC, in seconds.
    """
    return CollectivesKept(
        of_rank=ring.rank,
        pid=ring.pid,
        entered=ring.entered,
        newest=tuple(
            (
                one.seq,
                one.op,
                one.label,
                one.nbytes,
                one.step,
                one.entered_s + ahead_s,
                None if one.completed_s is None else one.completed_s + ahead_s,
                one.group,
                one.group_seq,
            )
            for one in ring.records[-NEWEST:]
        ),
    )


def collectives_of(record: Record) -> tuple[Collective, ...]:
    """The collectives of such an event, oldest first; their times are seconds since the epoch.

    Raises:
        KeyError, TypeError, ValueError: it has another shape.
    """
    rows: Sequence[KeptRow] = record.fields["newest"]
    return tuple(
        Collective(
            seq=int(seq),
            op=str(op),
            label=str(label),
            nbytes=int(nbytes),
            step=int(step),
            entered_s=float(entered_t),
            completed_s=None if completed_t is None else float(completed_t),
            group=str(group),
            group_seq=int(group_seq),
        )
        for seq, op, label, nbytes, step, entered_t, completed_t, group, group_seq in rows
    )
