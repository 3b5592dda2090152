"""Predicts, when a save begins, how long the training thread will wait for the copy."""

from __future__ import annotations

import statistics
from collections import deque

_SAVES = 5


class StallForecast:
    """Learns from each save how fast this rank copies, and how soon its update comes; for one thread.

    The copy begins with the save, and the update waits for its end. The stall is the time by which the copy outlasts
    the time until the update; both are predicted by medians of the last few saves.
    """

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_SAVES)
        self._until_update_s: deque[float] = deque(maxlen=_SAVES)
        self._nbytes = 0
        self._began = 0.0

    def begin(self, nbytes: int, now: float) -> float | None:
        """Note that a save begins.

        Args:
            nbytes: that it copies.
            now: on any monotonic clock, in seconds.

        Returns:
            Seconds that the update is expected to wait; None before the first save was copied.
        """
        self._nbytes, self._began = nbytes, now
        if not self._rates:
            return None
        return max(0.0, nbytes / statistics.median(self._rates) - statistics.median(self._until_update_s))

    def end(self, asked: float, copied: float | None) -> None:
        """Note that the update waited for the copy.

        Args:
            asked: when the update came, on the clock of :meth:`begin`.
            copied: when the copy ended, on the same clock; None if the save was given up.
        """
        if copied is not None and copied > self._began and self._nbytes:
            self._rates.append(self._nbytes / (copied - self._began))
            self._until_update_s.append(asked - self._began)
