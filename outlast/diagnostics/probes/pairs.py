"""Who tries out the link to whom, and when: in each round everybody has one partner at most."""

from __future__ import annotations

MOST_ROUNDS = 4
"""Each node meets so many others, however many there are: enough to tell its adapter from a link."""


def rounds(nodes: int, most: int = MOST_ROUNDS) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Pairs, the smaller number first, in rounds in which no node occurs twice; no pair occurs twice either.

    Up to five nodes, these are all pairs. Of an odd number, one has no partner in each round.

    Args:
        nodes: how many there are.
        most: rounds.
    """
    if nodes < 2:
        return ()
    seats = list(range(nodes)) + ([-1] if nodes % 2 else [])
    found = []
    for _ in range(min(most + nodes % 2, len(seats) - 1)):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append(tuple(sorted((min(a, b), max(a, b)) for a, b in pairs if min(a, b) >= 0)))
        seats[1:] = [seats[-1], *seats[1:-1]]  # the first stays, the others move on by one
    return tuple(found)
