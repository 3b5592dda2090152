"""Which place a node gets in a generation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from outlast.launch.control.messages import Report
from outlast.launch.control.records import Member


def in_order(waiting: Sequence[Report], before: Sequence[Member], most: int) -> tuple[Member, ...]:
    """The members of the next generation, in the order of their ranks.

    Who was in the last generation goes before who was not, and keeps its place where that still exists: its state, and
    its partners' copies of it, are then where they were. The others fill the gaps in the order of the nodes, so that
    nodes that are near each other have ranks that are.

    Args:
        waiting: the launchers that can take part; not empty.
        before: the members of the last generation, by rank.
        most: at most so many take part.
    """
    place = _places([one.member for one in waiting], before)
    stay = sorted((one for one in waiting if one.member.agent in place), key=lambda one: place[one.member.agent])
    fresh = sorted((one for one in waiting if one.member.agent not in place), key=_order)
    chosen = (stay + fresh)[:most]
    slots: list[Member | None] = [None] * len(chosen)
    moved = []
    for one in chosen:
        rank = place.get(one.member.agent, len(slots))
        if rank < len(slots):
            slots[rank] = one.member
        else:
            moved.append(one.member)
    rest = iter(moved)
    return tuple(slot if slot is not None else next(rest) for slot in slots)


def _places(waiting: Sequence[Member], before: Sequence[Member]) -> dict[str, int]:
    """The places of launchers that had one; one that was started again gets that of its node."""
    agents = {member.agent: rank for rank, member in enumerate(before)}
    place = {one.agent: agents[one.agent] for one in waiting if one.agent in agents}
    free = {member.node: rank for rank, member in enumerate(before) if member.agent not in place}
    for one in waiting:
        if one.agent not in place and one.node in free:
            place[one.agent] = free.pop(one.node)
    return place


def _order(report: Report) -> tuple[list[tuple[int, int, str]], str]:
    """node2 before node10."""
    return natural(report.order or report.member.name), report.member.agent


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in a text by their value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
