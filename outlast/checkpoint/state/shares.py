"""Dividing bytes evenly among ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def owner_of(holders: Sequence[int], before: int, nbytes: int, total: int) -> int:
    """Whose share the middle of some bytes falls in."""
    count = len(holders)
    return holders[min(count - 1, (2 * before + nbytes) * count // (2 * total)) if total else 0]


def share_out(sizes: Sequence[int], shares: int) -> list[int]:
    """Whose share each of some sizes is: in order, cut so that shares are as equal as whole sizes let them be."""
    before = [0, *itertools.accumulate(sizes)]
    return [owner_of(range(shares), start, size, before[-1]) for start, size in zip(before, sizes, strict=False)]
