"""How long collectives were pending in a step, from looks at whether any was, now and then."""

from __future__ import annotations

MISSED_LOOKS = 3
"""A step that is looked at closely is measured if a change was seen within so many times the usual time between two
looks,"""
MISSED_SHARE = 0.3
"""or within this share of the step."""
SELDOM_SHARE = 0.2
"""Any other step is measured if it took so long that no two looks were further apart than this share of it."""


class PendingTime:
    """Adds up the looks of one step after another. All times are seconds of one clock.

    Each look stands for the time around it, up to half of the way to its neighbours. So the sum is right on average, if
    the looks may come at any time of a step. What lies between is not known where a look came late; a step of which
    too little is known is not measured, because a wrong time would accuse somebody.

    ``collected_s`` is how long garbage was collected so far: nobody looks meanwhile, and the program enters nothing.
    """

    def __init__(self, now_s: float) -> None:
        self.begin(now_s, 1.0, close=False)

    def begin(self, now_s: float, gap_s: float, *, close: bool, collected_s: float = 0.0) -> None:
        """A step begins.

        Args:
            now_s: the time.
            gap_s: usual seconds between two looks.
            close: whether it is looked at closely.
            collected_s: so far.
        """
        self._gap_s, self._close = gap_s, close
        self._began_s = self._looked_s = now_s
        self._collected_s = collected_s
        self._is_first, self._was_pending = True, False
        self._pending_s = 0.0
        self._longest_s = self._unsure_s = 0.0  # between two looks; and of these, where it changed

    def look(self, now_s: float, pending: bool, collected_s: float = 0.0) -> None:
        """Whether a collective is pending now."""
        passed_s = self._passed_s(now_s, collected_s)
        if self._is_first:
            self._is_first = False
            self._pending_s += self._around_s(passed_s) if pending else 0.0
        elif pending != self._was_pending:
            self._unsure_s = max(self._unsure_s, passed_s)
            self._pending_s += passed_s / 2
        elif pending:
            self._pending_s += now_s - self._looked_s
        self._looked_s, self._collected_s, self._was_pending = now_s, collected_s, pending

    def end(self, now_s: float, collected_s: float = 0.0) -> float | None:
        """The step has ended: for how long of it a collective was pending; None if that is not known."""
        passed_s = self._passed_s(now_s, collected_s)
        step_s = now_s - self._began_s
        if self._was_pending:
            self._pending_s += self._around_s(passed_s)
        if self._close:
            known = self._unsure_s <= max(MISSED_LOOKS * self._gap_s, MISSED_SHARE * step_s)
        else:
            known = self._longest_s <= SELDOM_SHARE * step_s
        return min(self._pending_s, step_s) if known else None

    def _passed_s(self, now_s: float, collected_s: float) -> float:
        """Since the last look, without collections."""
        passed_s = max(now_s - self._looked_s - (collected_s - self._collected_s), 0.0)
        self._longest_s = max(self._longest_s, passed_s)
        return passed_s

    def _around_s(self, passed_s: float) -> float:
        """What the first look stands for that is before it, or the last one that is after it, if it is pending then."""
        if passed_s > self._gap_s:
            self._unsure_s = max(self._unsure_s, passed_s)
        return max(self._gap_s, passed_s) / 2
