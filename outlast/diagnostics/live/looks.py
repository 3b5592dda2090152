"""When a program's collectives are looked at: closely in some of its steps, the same on all ranks, and else seldom.

A look takes no time from a step, but a thread that wakes for it does: 50 to 200 µs, on a processor that has something
else in its caches, and where it must ask Python code for the interpreter's lock. Looks in every step would cost a
hundredth of it. In few steps they say the same of the others, if these are not all of one kind, such as those that
save: so the steps are spread by the golden ratio. Each rank decides by itself how many it can afford, a power of two
fewer than all, and one that measures fewer takes some of the others' steps: what ranks are compared by are the same
steps.
"""

from __future__ import annotations

import math
import random

EVERY_S = 0.01
"""Between two looks, while it is not known how long a step is, or what a look costs."""
CLOSE_LOOKS = 9.618
"""In a step that is looked at closely, on average; so that those of one step fall between those of the one before."""
SHORTEST_S = 0.001
"""Between two looks, however short a step is."""
SHARE = 0.001
"""Of the time, for close looks."""
CREDIT_S = 0.2
"""CPU seconds for close looks at a start, in every step: it is often then that something is wrong."""
FIRST_COST_S = 0.0001
"""CPU seconds of a look, until it is measured."""
_NEW_WEIGHT = 0.05
_SPREAD = 0x9E3779B1
"""2**32 times the golden ratio's fraction, as the nearest prime."""


class LookPlan:
    """Which steps are looked at closely, and how.

    Args:
        every_s: seconds between two looks, in all steps; None keeps to :data:`SHARE`.
    """

    def __init__(self, every_s: float | None = None) -> None:
        self.every_s = every_s
        self._cost_s = FIRST_COST_S
        self._credit_s = CREDIT_S
        self._random = random.Random()  # of its own: the program's numbers stay as they are

    def spent(self, cpu_s: float) -> None:
        """A close look took so much CPU time, its thread's waking included."""
        self._credit_s -= cpu_s
        self._cost_s += _NEW_WEIGHT * (cpu_s - self._cost_s)

    def gap_s(self, step: int, step_s: float) -> float:
        """Seconds between two looks in a step; 0 if it is not looked at closely.

        Args:
            step: its number, the same on all ranks.
            step_s: how long steps usually take; 0 while that is not known.
        """
        if self.every_s is not None:
            return self.every_s
        gap_s = step_s / CLOSE_LOOKS
        if self._credit_s > 0:
            return max(min(gap_s, EVERY_S), SHORTEST_S) if step_s else EVERY_S
        affordable_s = self._cost_s / SHARE
        gap_s = max(gap_s, SHORTEST_S)
        if gap_s >= affordable_s:  # in a long step there is time for more
            return affordable_s
        stride = 1 << math.ceil(math.log2(affordable_s / gap_s))
        return gap_s if is_one_in(stride, step) else 0.0

    def first_s(self, gap_s: float) -> float:
        """Seconds from the beginning of a step to the first look: any time up to the next one, so that no moment of
        the step is looked at more often than another."""
        return gap_s * self._random.random()


def is_one_in(stride: int, step: int) -> bool:
    """Whether a step is among those that a rank measures which can afford one in ``stride``, a power of two.

    They are spread evenly, but with no period that something in the program may have too. Those of a larger stride are
    some of those of a smaller one.
    """
    return (step * _SPREAD) % 2**32 < 2**32 // stride
