"""Dividing bytes evenly among ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def owner_of(holders: Sequence[int], before: int, nbytes: int, total: int) -> int:
    """The holder whose share contains the middle of a run of bytes.

    Args:
        holders: each has an equal share of all bytes, in this order.
        before: bytes before the run.
        nbytes: of the run.
        total: of all runs.
    """
    count = len(holders)
    return holders[min(count - 1, (2 * before + nbytes) * count // (2 * total)) if total else 0]


def share_out(sizes: Sequence[int], shares: int) -> list[int]:
    """Divide items of these sizes, in order, into shares that are as equal as whole items allow; the share of each."""
    before = [0, *itertools.accumulate(sizes)]
    return [owner_of(range(shares), start, size, before[-1]) for start, size in zip(before, sizes, strict=False)]
