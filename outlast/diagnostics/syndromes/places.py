"""When several slow ranks are one slow node."""

from __future__ import annotations

from collections.abc import Collection, Mapping

WHOLE_NODE = 0.75
"""A node is slow if this share of its ranks is."""


def whole_nodes(slow: Collection[int], nodes: Mapping[int, str]) -> dict[str, list[int]]:
    """The nodes that are slow themselves, with their slow ranks.

    A node with one rank is told as that rank; and where there is one node, its ranks are compared with themselves.

    Args:
        slow: ranks.
        nodes: by rank, of all ranks, where it is.
    """
    names = sorted(set(nodes.values()))
    if len(names) < 2:
        return {}
    found = {}
    for name in names:
        there = [rank for rank, node in nodes.items() if node == name]
        late = sorted(rank for rank in there if rank in slow)
        if len(late) > 1 and len(late) >= WHOLE_NODE * len(there):
            found[name] = late
    return found
