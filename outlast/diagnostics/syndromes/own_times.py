"""What ranks told of themselves, step by step: only what one had beyond its peers is why it was late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from outlast.diagnostics.syndromes.others import Floats, beyond_others
from outlast.diagnostics.syndromes.uneven import is_explained_by, longer_by_work_s

Rows = npt.NDArray[np.int64]

NO_WORK = ("garbage_collection", "data_wait", "compile", "checkpoint")
"""What a rank loses with these is not for having more to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnTimes:
    """Of all ranks, in the steps that count."""

    seconds: Mapping[str, Floats] = field(default_factory=dict)
    """By what it was, as :data:`~outlast.diagnostics.syndromes.facts.FACT_KINDS` calls it, [steps, ranks]: 0 where
    nothing was told. What never was so may be left out."""
    elements: Floats | None = None
    """[steps, ranks]: of the batches; NaN where that is not known. None if nobody tells."""
    work_s: Floats | None = None
    """[steps, ranks]: of each step, outside collectives and without waiting for data."""

    def beyond_s(self, what: str, column: int, at: Rows) -> Floats | None:
        """[steps at], seconds: what a rank had beyond the median of the others; None if it never was so.

        Args:
            what: kept it from its work.
            column: of the rank.
            at: the rows of the steps in question.
        """
        seconds = self.seconds.get(what)
        return None if seconds is None else beyond_others(seconds[at], column)

    def by_work_s(self, column: int, at: Rows, behind_s: Floats) -> Floats | None:
        """[steps at], seconds: by how much longer it takes for having more to do; None if that does not explain it.

        Args:
            column: of the rank.
            at: the rows of the steps in question.
            behind_s: [steps at]: by how much it was behind its median peer there.
        """
        if self.elements is None or self.work_s is None:
            return None
        more_s = longer_by_work_s(self.elements[at], self.work_s[at], column)
        known = [one for what in NO_WORK if (one := self.beyond_s(what, column, at)) is not None]
        otherwise_s = np.sum(known, axis=0) if known else np.zeros(len(at))
        return more_s if is_explained_by(more_s, np.maximum(behind_s - otherwise_s, 0.0)) else None
