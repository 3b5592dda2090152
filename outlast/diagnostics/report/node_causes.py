"""What the nodes' monitors saw while ranks were slow: the software cause beside the rank that was late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from outlast.diagnostics import formatting as fmt
from outlast.diagnostics.syndromes.facts import held_s, overlap_s
from outlast.diagnostics.syndromes.rules import Rules
from outlast.events import Record

COVERED_SHARE = Rules.covered_share
"""Of the time in which ranks were slow, which a condition must have held: it is found a sample or two late."""
HELD_SHARE = 0.1
"""... and, where that is measured, in which it held a rank back."""
MOST_NAMED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStretch:
    """Something that was so on a node for a while."""

    host: str
    what: str
    words: str
    begin_t: float
    end_t: float
    measured_s: float | None
    ranks: tuple[int, ...]

    def held_s(self, begin_t: float, end_t: float) -> float:
        """Of these seconds, those in which it held, as far as is known: measured where it can be."""
        length_s = self.end_t - self.begin_t
        measured_s = None if self.measured_s is None else min(self.measured_s, length_s)
        return held_s(self.begin_t, self.end_t, measured_s, since_s=begin_t, until_s=end_t)

    def covers(self, begin_t: float, end_t: float) -> bool:
        """Whether it explains that ranks were slow then."""
        length_s = end_t - begin_t
        both_s = overlap_s(self.begin_t, self.end_t, since_s=begin_t, until_s=end_t)
        return both_s > COVERED_SHARE * length_s and self.held_s(begin_t, end_t) > HELD_SHARE * length_s


class NodeCauses:
    """The conditions of all nodes of a run.

    Args:
        records: ``node_condition`` events, oldest first.
        hosts: where ranks ran, by (attempt, generation, rank).
    """

    def __init__(self, records: Iterable[Record], hosts: Mapping[tuple[int, int, int], str]) -> None:
        newest: dict[tuple[object, ...], NodeStretch] = {}
        for record in records:
            one = _stretch(record)
            if one is not None:
                newest[one.host, one.what, record.fields.get("key"), one.begin_t] = one
        self.stretches = tuple(newest.values())
        self._hosts = hosts

    def during(self, begin_t: float, end_t: float, rank: int | None = None, host: str | None = None) -> str:
        """``node a: its cgroup /job was throttled (CPU quota of 0.2 cores), for 31 s of 40 s``; empty if nothing was.

        Args:
            begin_t: when ranks began to be slow, seconds since the epoch.
            end_t: until when they were.
            rank: the one that was late; None if all were slow, so that it may be any node's doing.
            host: where it ran; found by its rank if None.
        """
        if end_t <= begin_t:
            return ""
        places = {host} if host is not None else {at for (*_, one), at in self._hosts.items() if one == rank}
        found = [
            one
            for one in self.stretches
            if one.covers(begin_t, end_t)
            and (rank is None or (one.host in places and (not one.ranks or rank in one.ranks)))
        ]
        found.sort(key=lambda one: -one.held_s(begin_t, end_t))
        whole = fmt.duration(end_t - begin_t)
        return " and ".join(
            f"node {one.host}{_with_ranks(one) if rank is None else ''}: {one.words}, for "
            f"{fmt.duration(one.held_s(begin_t, end_t))} of {whole}"
            for one in found[:MOST_NAMED]
        )


def _with_ranks(one: NodeStretch) -> str:
    """`` (rank 1)``: whom it concerned; empty if all of the node."""
    if not one.ranks:
        return ""
    shown = ", ".join(map(str, one.ranks[:8]))
    return f" (rank{'s' if len(one.ranks) > 1 else ''} {shown}{' …' if len(one.ranks) > 8 else ''})"


def _stretch(record: Record) -> NodeStretch | None:
    """None where the event lacks something, as one of a version to come."""
    get = record.fields.get
    since_t, seconds, measured_s, ranks = get("since_t"), get("seconds"), get("measured_s"), get("ranks")
    if not isinstance(since_t, (int, float)) or not isinstance(seconds, (int, float)):
        return None
    return NodeStretch(
        host=str(get("host")),
        what=str(get("what")),
        words=str(get("words")),
        begin_t=float(since_t),
        end_t=float(since_t) + float(seconds),
        measured_s=float(measured_s) if isinstance(measured_s, (int, float)) else None,
        ranks=tuple(one for one in ranks if isinstance(one, int)) if isinstance(ranks, list) else (),
    )
