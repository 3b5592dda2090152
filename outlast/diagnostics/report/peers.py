"""Each rank against all others, step by step, in time that does not grow with the square of the ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outlast.diagnostics.report.load import Floats

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


class Peers:
    """How much more than its median peer each rank has.

    Args:
        values: [steps, ranks]; NaN where a rank did not take the step.
    """

    def __init__(self, values: Floats) -> None:
        self._values = values
        order = np.argsort(values, axis=1)  # NaN comes last
        self._ordered: Floats = np.take_along_axis(values, order, axis=1)
        self._place = np.empty(values.shape, dtype=np.int32)
        np.put_along_axis(self._place, order, np.arange(values.shape[1], dtype=np.int32)[None, :], axis=1)
        self._known = (~np.isnan(values)).sum(axis=1)

    def more(self, at: Indices, column: int) -> Floats:
        """[steps at]: the value of a rank minus the median of the others; NaN where either is missing."""
        own = self._values[at, column]
        known = self._known[at]
        missing = np.isnan(own)
        place = np.where(missing, known, self._place[at, column])
        others = known - ~missing

        def other(number: npt.NDArray[np.int64]) -> Floats:
            found: Floats = self._ordered[at, np.minimum(number + (number >= place), self._values.shape[1] - 1)]
            return found

        median = (other(np.maximum(others - 1, 0) // 2) + other(others // 2)) / 2
        more: Floats = own - np.where(others > 0, median, np.nan)
        return more


class Rivals:
    """The latest of the ranks that a rank is compared with.

    Args:
        late: [steps, ranks]: lateness.
        blamed: [steps, ranks]: lateness that counts as 0, for somebody is blamed for it already.
    """

    def __init__(self, late: Floats, blamed: Bools) -> None:
        counted = np.where(blamed | np.isnan(late), 0.0, late)
        steps = np.arange(len(counted))
        self._latest = np.argmax(counted, axis=1)
        self._most = counted[steps, self._latest]
        counted[steps, self._latest] = -np.inf
        self._second = counted.max(axis=1)

    def most(self, at: Indices, column: int) -> Floats:
        """[steps at]: the lateness of the latest other rank."""
        found: Floats = np.where(self._latest[at] == column, self._second[at], self._most[at])
        return found
