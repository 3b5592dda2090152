"""Each rank against all others, step by step, in time that does not grow with the square of the ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from outlast.diagnostics.syndromes.others import Floats, median_of_others

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


class Peers:
    """How much more than its median peer each rank has.

    Args:
        values: [steps, ranks]; NaN where a rank did not take the step.
    """

    def __init__(self, values: Floats) -> None:
        self._more: Floats = values - median_of_others(values)

    def more(self, at: Indices, column: int) -> Floats:
        """[steps at]: the value of a rank minus the median of the others; NaN where either is missing."""
        more: Floats = self._more[at, column]
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
