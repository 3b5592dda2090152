"""When the next checkpoint is due with ``every_steps = "auto"``: measured as training goes, decided on one rank."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from outlast.checkpoint.config import CheckpointConfig

PRIOR_LIMIT_S = 3600.0
"""What is expected of failures beforehand counts as at most that much time of the run itself. Short, since errors do
not cost alike: saving too often loses δ/τ at most, saving too rarely loses τ at every failure until that is learned."""


_WARM_UP_STEPS = 2
_LOOK_S = 30.0
"""It is judged anew at least this often: steps may become slower, and time without failures counts."""
_TELL_SHARE = 0.1
"""Changes by less than this share of the interval are not told."""


@dataclass(frozen=True, slots=True)
class Interval:
    """What was decided, and from what."""

    every_steps: int
    cost_s: float
    """Seconds of training that a save costs."""
    mtbf_s: float
    """Expected mean seconds between failures of the whole run."""
    why: str
    """In one line."""


class AutoInterval:
    """Measures what saves cost and decides when one is due. On one rank, from its training thread.

    The cost of a save is the time for which it held the training thread, and what the steps beside it took longer than
    steps beside none. (The time until it is durable is no cost, but the next save waits for it, and one step more, so
    that there always are steps beside none.) The median of the last few saves is the cost.

    Args:
        config: with ``every_steps = "auto"``.
        world_size: ranks; each is expected to fail every ``config.rank_mtbf_h``.
        failures: of earlier starts of the run.
        trained_s: seconds that those trained, as of ``world_size`` ranks.
    """

    FIRST_LOOK_STEPS: ClassVar[int] = 7
    """To be asked for the first time after so many steps, and to say yes: what a save costs shows only when one is
    made."""

    def __init__(self, config: CheckpointConfig, world_size: int, *, failures: int = 0, trained_s: float = 0.0) -> None:
        self._config = config
        self._prior_s = config.rank_mtbf_h * 3600 / world_size
        self._failures = failures
        self._trained_s = trained_s
        self._steps = 0
        self._idle_s: deque[float] = deque(maxlen=32)
        self._costs_s: deque[float] = deque(maxlen=8)
        self._durable_steps: deque[int] = deque(maxlen=8)
        self._saved_at: int | None = None  # step of the newest save
        self._beside: list[float] | None = None  # what the steps beside the running save took, its first apart
        self._began_in = 0  # number of that first step
        self._blocked_s = 0.0
        self._failed = False
        self._told: Interval | None = None

    def note(self, step_s: float, blocked_s: float, *, saving: bool) -> None:
        """A step was done.

        Args:
            step_s: its seconds, ``blocked_s`` included.
            blocked_s: for which checkpointing held the training thread.
            saving: whether a save is under way at its end.
        """
        self._steps += 1
        self._trained_s += step_s
        if self._beside is None:
            if self._steps > _WARM_UP_STEPS:
                self._idle_s.append(step_s - blocked_s)
            return
        self._blocked_s += blocked_s
        if self._steps > self._began_in:
            self._beside.append(step_s - blocked_s)
        if not saving:
            self._end()

    def failed(self) -> None:
        """The save that is under way has failed; may be called from any thread, before it ends."""
        self._failed = True

    def decide(self, step: int, *, saving: bool) -> tuple[bool, int]:
        """Whether to save after ``step``, and after how many steps to ask again.

        To be called after a step's update and before its :meth:`note`; if the answer is yes, the save must be made.

        Args:
            step: just done.
            saving: whether a save is under way.
        """
        if not self._idle_s:  # a run of a few steps
            return False, 1
        step_s = statistics.median(self._idle_s)
        look_steps = max(1, math.ceil(_LOOK_S / step_s))
        if self._saved_at is None:
            due = step
        elif self._costs_s:
            due = self._saved_at + self.interval().every_steps
        else:  # the first one is still under way, or failed
            due = self._saved_at + look_steps
        if saving or self._beside is not None:
            return False, 1
        if step < due:
            return False, min(due - step, look_steps)
        self._saved_at, self._beside, self._blocked_s, self._failed = step, [], 0.0, False
        self._began_in = self._steps + 1
        return True, 1 if not self._costs_s else min(self.interval().every_steps, look_steps)

    def interval(self) -> Interval:
        """What follows from what was measured; at least one save must have been made."""
        step_s = statistics.median(self._idle_s)
        cost_s = statistics.median(self._costs_s)
        mtbf_s = expected_mtbf_s(self._prior_s, self._failures, self._trained_s)
        best_s = optimal_interval_s(cost_s, mtbf_s)
        least = math.ceil(statistics.median(self._durable_steps)) + 1
        most = max(1, int(self._config.interval_limit_s / step_s))
        every = max(1, round(best_s / step_s))
        why = (
            f"a save costs {cost_s:.3g} s of training; a failure every {_time(mtbf_s)} ({self._failures} seen in "
            f"{_time(self._trained_s)}, expected beforehand {_time(self._prior_s)}): best {_time(best_s)} apart, "
            f"{every} steps of {step_s:.3g} s"
        )
        if every > most:
            every, why = most, f"{why}; at most checkpoint.interval_limit_s = {self._config.interval_limit_s:g}"
        if every < least:
            every, why = least, f"{why}; a save takes {least - 1} steps until it is durable"
        return Interval(every, cost_s, mtbf_s, why)

    def news(self) -> Interval | None:
        """The interval, if it is one that was not told yet, or differs from that by a tenth."""
        if not self._costs_s:
            return None
        now = self.interval()
        if self._told is not None and abs(now.every_steps / self._told.every_steps - 1) < _TELL_SHARE:
            return None
        self._told = now
        return now

    def _end(self) -> None:
        beside, self._beside = self._beside or [], None
        if self._failed:
            return
        slower_s = sum(beside) - len(beside) * statistics.median(self._idle_s)
        self._costs_s.append(self._blocked_s + max(0.0, slower_s))
        self._durable_steps.append(len(beside))


def _time(seconds: float) -> str:
    for unit, length_s in (("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.3g} {unit}"
    return f"{seconds:.3g} s"


def optimal_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Daly's higher-order optimum: seconds of training between the end of one save and the begin of the next.

    τ = √(2δM) (1 + √(δ/2M)/3 + (δ/2M)/9) - δ for δ < 2M, else M.

    Args:
        cost_s: δ, seconds that a save takes from training, >= 0.
        mtbf_s: M, mean seconds between failures, > 0.
    """
    ratio = cost_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def expected_mtbf_s(prior_s: float, failures: int, trained_s: float) -> float:
    """Mean seconds between failures, from what was expected and what was seen.

    What is lost is linear in the failure rate, so the rate's posterior mean is what counts. Failures are a Poisson
    process, and the prior of its rate a Gamma distribution of mean ``1 / prior_s`` that counts as one failure in
    ``prior_s`` or, where that is longer than ``PRIOR_LIMIT_S``, as that fraction of a failure in ``PRIOR_LIMIT_S``:
    a run that fails every few minutes is soon believed. Where nothing has failed yet, the result is no longer than
    what was expected or seen.

    Args:
        prior_s: expected before anything was seen, > 0.
        failures: seen.
        trained_s: seconds of training in which they were seen.
    """
    weight_s = min(prior_s, PRIOR_LIMIT_S)
    posterior_s = (weight_s + trained_s) / (weight_s / prior_s + failures)
    return min(posterior_s, max(prior_s, trained_s))
