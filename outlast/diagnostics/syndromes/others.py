"""A rank against the others: of each step, the median of all ranks but this one.

A rank does not count in what it is compared with. So of two ranks each has the other one, and where half of an even
number are slow, each slow one is compared with one that is not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_CELLS = 1 << 20
"""Sorted at a time, so that a long run does not take several times its memory."""


def median_of_others(values: Floats) -> Floats:
    """[steps, ranks]: of each value, the median of the other ranks' in the same step.

    Takes time that grows with the ranks, and not with their square.

    Args:
        values: [steps, ranks]; NaN where a rank did not take the step. It is NaN there in what is returned too, and
            where there are no others.
    """
    found = np.full(values.shape, np.nan)
    rows = max(1, _CELLS // max(values.shape[1], 1))
    for begin in range(0, len(values), rows):
        found[begin : begin + rows] = _of_block(values[begin : begin + rows])
    return found


def _of_block(values: Floats) -> Floats:
    if not values.size:
        return np.full(values.shape, np.nan)
    order = np.argsort(values, axis=1)  # NaN last
    ordered = np.take_along_axis(values, order, axis=1)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(values.shape[1])[None, :], axis=1)
    others = np.isfinite(values).sum(axis=1)[:, None] - 1
    low, high = np.maximum(others - 1, 0) // 2, np.maximum(others, 0) // 2
    top = values.shape[1] - 1
    first = np.take_along_axis(ordered, np.minimum(low + (place <= low), top), axis=1)
    second = np.take_along_axis(ordered, np.minimum(high + (place <= high), top), axis=1)
    found: Floats = np.where((others > 0) & np.isfinite(values), (first + second) / 2, np.nan)
    return found


def beyond_others(values: Floats, column: int) -> Floats:
    """[steps]: by how much the value of one rank exceeds the median of the others; 0 where it does not, or is missing.

    Args:
        values: [steps, ranks].
        column: of the rank.
    """
    beyond: Floats = np.maximum(np.nan_to_num(values[:, column] - median_beside(values, column)), 0.0)
    return beyond


def median_beside(values: Floats, column: int) -> Floats:
    """[steps]: the median of all ranks but one, whether that one is known or not; NaN where there are no others.

    Args:
        values: [steps, ranks].
        column: of the one.
    """
    others = np.delete(values, column, axis=1)
    found = np.full(len(values), np.nan)
    some = np.isfinite(others).any(axis=1)
    if some.any():
        found[some] = np.nanmedian(others[some], axis=1)
    return found
