"""Whether a rank is late because it has more to do than others: more elements in its batches."""

from __future__ import annotations

import numpy as np

from outlast.diagnostics.syndromes.others import Floats, median_beside

LEAST_MORE = 0.05
"""Of the median rank's work: a difference that is smaller is none."""
LEAST_CORRELATION = 0.5
"""Between what a rank has more to do and how much longer it takes, where that varies from step to step."""


def longer_by_work_s(elements: Floats, work_s: Floats, column: int) -> Floats:
    """[steps], seconds: by how much longer than its median peer a rank takes because it has more to do.

    What an element takes is learned from the other ranks, so that a rank that is slow for another reason, and has a
    little more to do, is not explained by it.

    Args:
        elements: [steps, ranks], of the batches; NaN where that is not known.
        work_s: [steps, ranks], seconds of each step without waiting for others.
        column: of the rank in question.
    """
    typical = median_beside(elements, column)
    found = np.zeros(len(elements))
    known = np.isfinite(elements[:, column]) & np.isfinite(typical)
    if not known.any():
        return found
    peers = np.delete(elements, column, axis=1)[known]
    each = np.delete(work_s, column, axis=1)[known] / np.where(peers > 0, peers, np.nan)
    if not np.isfinite(each).any():
        return found
    more = elements[known, column] - typical[known]
    found[known] = np.where(more > LEAST_MORE * typical[known], more * np.nanmedian(each), 0.0)
    return found


def is_explained_by(more_s: Floats, longer_s: Floats) -> bool:
    """Whether a rank takes longer in the steps in which it has more to do, as far as that varies between steps.

    Args:
        more_s: [steps], as :func:`longer_by_work_s` gives it.
        longer_s: [steps], seconds by which the rank was behind its median peer.
    """
    if not more_s.any():
        return False
    if len(more_s) < 3 or more_s.std() <= 0.1 * more_s.mean() or longer_s.std() == 0:
        return True  # it has as much more to do in every step: there is nothing to compare
    return bool(np.corrcoef(more_s, longer_s)[0, 1] >= LEAST_CORRELATION)
