"""Where a number is heading: a robust line through its newest samples, and the step at which it meets a limit."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

_MOST = 32
"""Samples that a line goes through."""
_LEAST = 12
_TAU = 0.7
"""Kendall's rank correlation with the step that a trend has at least; noise of twelve samples has it once in 3000."""
_AHEAD = 4.0
"""How far a line is followed, as a multiple of the steps it was seen for."""


@dataclass(frozen=True, slots=True)
class Drift:
    """A number that is on its way to a limit, or has reached it."""

    value: float
    """The newest."""
    at_step: int | None
    """When it will meet the limit, if it goes on so; None: it has."""
    samples: int
    first_step: int
    """Of the samples that say so."""


class Trend:
    """Samples of one number.

    The line is Theil and Sen's, the median of the slopes of all pairs. It is followed for four times as long as it was
    seen, and only if the samples rise, or fall, in nearly all pairs. A drift is told once; again when half of the steps
    that were left are over, and when the limit is reached.

    Args:
        limit: that matters.
        falling: whether numbers matter below it.
        in_logs: the line goes through the logarithms: of numbers that fall by factors.
    """

    def __init__(self, limit: float, *, falling: bool = False, in_logs: bool = False) -> None:
        self._limit = limit
        self._falling = falling
        self._in_logs = in_logs
        self._samples: deque[tuple[int, float]] = deque(maxlen=_MOST)
        self._left: float | None = None  # steps that were left when it was told
        self._reached = False

    def add(self, step: int, value: float) -> Drift | None:
        """The sample of ``step``; a drift if there is something to tell. What has no logarithm is left out."""
        if not math.isfinite(value) or (self._in_logs and value <= 0):
            return None
        self._samples.append((step, value))
        if (value <= self._limit) if self._falling else (value >= self._limit):
            if self._reached:
                return None
            self._reached = True
            return Drift(value, None, len(self._samples), self._samples[0][0])
        self._reached = False
        at_step = self._meets()
        if at_step is None:
            return None
        left = at_step - step
        if self._left is not None and left > self._left / 2:
            return None
        self._left = left
        return Drift(value, at_step, len(self._samples), self._samples[0][0])

    def _meets(self) -> int | None:
        if len(self._samples) < _LEAST:
            return None
        steps = np.array([step for step, _ in self._samples], dtype=np.float64)
        values = np.array([value for _, value in self._samples], dtype=np.float64)
        limit = self._limit
        if self._in_logs:
            values, limit = np.log(values), math.log(limit)
        one, other = np.triu_indices(len(steps), k=1)
        rises = (values[other] - values[one]) * (-1 if self._falling else 1)
        if float(np.sign(rises).mean()) < _TAU:
            return None
        slope = float(np.median((values[other] - values[one]) / (steps[other] - steps[one])))
        if slope == 0:
            return None
        level = float(np.median(values - slope * steps))
        at_step = (limit - level) / slope
        newest = float(steps[-1])
        if not newest < at_step <= newest + _AHEAD * (newest - float(steps[0])):
            return None
        return math.ceil(at_step)
