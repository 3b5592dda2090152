"""How long the training thread will wait for a copy, foretold when the save begins."""

from __future__ import annotations

import statistics
from collections import deque

_REMEMBERED = 5


class StallForecast:
    """Learns from each save how fast this rank copies and when its update comes; for one thread.

    The copy begins with the save, and the update asks for its end: what the copy takes longer than the update takes to
    come is the stall. Medians of the last few saves are what is expected of the next.
    """

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_REMEMBERED)
        self._leads_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._nbytes = 0
        self._began = 0.0

    def begin(self, nbytes: int, now: float) -> float | None:
        """A save begins that copies ``nbytes``.

        Returns:
            Seconds that the update is expected to wait; None before a save was seen whole.
        """
        self._nbytes, self._began = nbytes, now
        if not self._rates:
            return None
        return max(0.0, nbytes / statistics.median(self._rates) - statistics.median(self._leads_s))

    def end(self, asked: float, copied: float | None) -> None:
        """The update asked for the copy's end at ``asked``; ``copied``: when that was, None if the save was given up.

        Both on the clock of :meth:`begin`.
        """
        if copied is not None and copied > self._began and self._nbytes:
            self._rates.append(self._nbytes / (copied - self._began))
            self._leads_s.append(asked - self._began)
