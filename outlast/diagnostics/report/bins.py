"""Values of many steps and ranks in as many bins as a screen can show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from outlast.diagnostics.report.load import Floats


def edges_of(length: int, most: int) -> list[int]:
    """Bounds of at most ``most`` bins of equal length over ``length`` values."""
    each = max(1, math.ceil(length / most))
    return [*range(0, length, each), length] if length else []


def bins_of(steps: Sequence[int], edges: list[int]) -> list[tuple[int, int]]:
    """The first and last step of each bin."""
    return [(steps[low], steps[high - 1]) for low, high in itertools.pairwise(edges)]


def binned(values: Floats, edges: list[int], reduce: Any) -> list[float]:
    """``reduce`` over the finite values of each bin; NaN if there are none."""
    found = []
    for low, high in itertools.pairwise(edges):
        part = values[low:high]
        part = part[np.isfinite(part)]
        found.append(float(reduce(part)) if len(part) else math.nan)
    return found


def mean_and_most(values: Floats, edges: list[int]) -> tuple[Floats, Floats]:
    """[ranks, bins] each: the mean and the maximum over the finite values of [ranks, steps]; NaN if there are none."""
    if not edges:
        return np.empty((len(values), 0)), np.empty((len(values), 0))
    begins = edges[:-1]
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        counts = np.add.reduceat(finite.astype(np.float64), begins, axis=1)
        mean = np.add.reduceat(np.where(finite, values, 0.0), begins, axis=1) / counts
    most = np.fmax.reduceat(np.where(finite, values, np.nan), begins, axis=1)
    return np.where(counts > 0, mean, np.nan), most


def rounded(values: Sequence[float] | Floats, digits: int) -> list[float | None]:
    """For JSON: what is not finite is None."""
    return [round(float(value), digits) if math.isfinite(value) else None for value in values]
