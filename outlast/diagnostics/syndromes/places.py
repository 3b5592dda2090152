"""What nodes are called, and when several slow ranks are one slow node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

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


def node_names(hosts: Sequence[str]) -> tuple[str, ...]:
    """A name for each node that no other has: its host, with its number where two have the same.

    Args:
        hosts: by the nodes' numbers; empty where it is not known, which leaves the number.
    """
    times = Counter(hosts)
    return tuple(
        str(number) if not host else f"{host} (node {number})" if times[host] > 1 else host
        for number, host in enumerate(hosts)
    )
