"""How long to wait before ranks are restarted that fail again and again."""

from __future__ import annotations

SETTLED_S = 60.0
"""A start that lasted this long has got somewhere, where nothing says how far."""


class Backoff:
    """No wait after a start that got further than all before it; else twice as long from one start to the next.

    So a rank that dies now and then is replaced at once, and one that fails at an import, or at the same step each
    time, does not use up its restarts in seconds.

    Args:
        first_s: the first wait.
        longest_s: no wait is longer.
    """

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._furthest_step = 0
        self.in_vain = 0
        """How many starts in a row got no further than an earlier one."""

    def after(self, step: int | None, lasted_s: float) -> float:
        """Seconds to wait after a start that failed.

        Args:
            step: the furthest step that it began; None if that is not known.
            lasted_s: how long it lasted.
        """
        known = step or 0
        if known > self._furthest_step or (step is None and lasted_s >= SETTLED_S):
            self._furthest_step = max(known, self._furthest_step)
            self.in_vain = 0
            return 0.0
        self.in_vain += 1
        return float(min(self._longest_s, self._first_s * 2.0 ** min(self.in_vain - 1, 32)))

    def describe(self, step: int | None, lasted_s: float, wait_s: float) -> str:
        """What happened to the start of :meth:`after`, and what is done about it, as text for people."""
        where = f"after {lasted_s:.1f} s" if step is None else f"no further than step {step}"
        again = f", {self.in_vain} times in a row" if self.in_vain > 1 else ""
        return (
            f"the ranks failed {'before their first step' if step == 0 else where}{again}; restarting them in "
            f"{wait_s:.3g} s (launch.backoff_s)"
        )
