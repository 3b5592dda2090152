"""Whether this node's clocks jumped: the watcher was stopped, the machine suspended, or the time of day set."""

from __future__ import annotations

import time
from dataclasses import dataclass

JUMP_S = 1.0
"""Less is a busy machine, or a clock that is being disciplined."""


@dataclass(frozen=True, slots=True)
class ClockUse:
    """Of one interval."""

    late_s: float = 0.0
    """Seconds by which the watcher came too late, beyond ``JUMP_S``: it did not run, so it judges nobody for them."""
    suspended_s: float = 0.0
    """Seconds for which the machine was suspended."""
    set_by_s: float = 0.0
    """By how much the time of day was set, forward if positive."""


class ClockJumps:
    """Compares the machine's clocks with one another.

    Args:
        interval_s: between two ticks, when all is well.
    """

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._before: tuple[float, float, float] | None = None

    def tick(self) -> ClockUse:
        """What happened since the tick before."""
        now = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
        before, self._before = self._before, now
        if before is None:
            return ClockUse()
        passed, booted, told = (after - earlier for after, earlier in zip(now, before, strict=True))
        late, suspended = passed - self.interval_s, booted - passed
        set_by = told - booted
        return ClockUse(
            late_s=late if late > max(JUMP_S, self.interval_s) else 0.0,
            suspended_s=suspended if suspended > JUMP_S else 0.0,
            set_by_s=set_by if abs(set_by) > JUMP_S else 0.0,
        )
