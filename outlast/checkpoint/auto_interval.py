"""When the next checkpoint is due with ``every_steps = "auto"``: measured during training, decided on one rank."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from outlast.checkpoint.config import CheckpointConfig

PRIOR_LIMIT_S = 3600.0
"""The prior expectation of failures counts as at most this much time of the run itself. It is short, since the two
errors do not cost the same: saving too often loses at most δ/τ; saving too rarely loses τ at every failure until the
rate is learned."""


_WARM_UP_STEPS = 2
_DECIDE_S = 30.0
"""The interval is decided again at least this often: steps may become slower, and time without failures counts."""
_REPORT_SHARE = 0.1
"""Changes by less than this share of the interval are not reported."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The interval, and the figures it follows from."""

    every_steps: int
    cost_s: float
    """Seconds of training that a save costs."""
    mtbf_s: float
    """Expected mean seconds between failures of the whole run."""
    why: str
    """In one line."""


class AutoInterval:
    """Measures what saves cost, and decides when one is due. Used on one rank, from its training thread.

    The cost of a save is the time for which it blocked the training thread, plus the time by which steps during the
    save took longer than other steps. (The time until the save is durable is no cost, but the next save waits for it,
    and for one step more, so that there are always steps without a save.) The median of the last few saves counts.

    Args:
        config: with ``every_steps = "auto"``.
        world_size: number of ranks; each is expected to fail every ``config.rank_mtbf_h``.
        failures: in earlier attempts of the run.
        trained_s: seconds for which those trained, scaled to ``world_size`` ranks.
    """

    FIRST_DECISION_STEPS: ClassVar[int] = 7
    """:meth:`decide` is to be called first after this many steps, and says yes: only a save shows what saves cost."""

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
        self._during: list[float] | None = None  # seconds of the steps during the running save, without its first
        self._first_step = 0  # number of that first step
        self._blocked_s = 0.0
        self._failed = False
        self._reported: Interval | None = None

    def note(self, step_s: float, blocked_s: float, *, saving: bool) -> None:
        """Note that a step was done.

        Args:
            step_s: seconds of the step, ``blocked_s`` included.
            blocked_s: seconds for which checkpointing blocked the training thread.
            saving: whether a save is under way at the step's end.
        """
        self._steps += 1
        self._trained_s += step_s
        if self._during is None:
            if self._steps > _WARM_UP_STEPS:
                self._idle_s.append(step_s - blocked_s)
            return
        self._blocked_s += blocked_s
        if self._steps > self._first_step:
            self._during.append(step_s - blocked_s)
        if not saving:
            self._end()

    def failed(self) -> None:
        """Note that the save under way has failed. May be called from any thread, before the save ends."""
        self._failed = True

    def decide(self, step: int, *, saving: bool) -> tuple[bool, int]:
        """Whether to save after ``step``, and after how many steps to call this again.

        Call it after a step's update and before its :meth:`note`. If the answer is yes, the save must be made.

        Args:
            step: number of the step just done.
            saving: whether a save is under way.
        """
        if not self._idle_s:  # a run of a few steps
            return False, 1
        step_s = statistics.median(self._idle_s)
        decide_steps = max(1, math.ceil(_DECIDE_S / step_s))
        if self._saved_at is None:
            due = step
        elif self._costs_s:
            due = self._saved_at + self.interval().every_steps
        else:  # the first save is still under way, or failed
            due = self._saved_at + decide_steps
        if saving or self._during is not None:
            return False, 1
        if step < due:
            return False, min(due - step, decide_steps)
        self._saved_at, self._during, self._blocked_s, self._failed = step, [], 0.0, False
        self._first_step = self._steps + 1
        return True, 1 if not self._costs_s else min(self.interval().every_steps, decide_steps)

    def interval(self) -> Interval:
        """The interval that follows from what was measured; at least one save must have been made."""
        step_s = statistics.median(self._idle_s)
        cost_s = statistics.median(self._costs_s)
        mtbf_s = expected_mtbf_s(self._prior_s, self._failures, self._trained_s)
        best_s = optimal_interval_s(cost_s, mtbf_s)
        least = math.ceil(statistics.median(self._durable_steps)) + 1
        most = max(1, int(self._config.interval_limit_s / step_s))
        every = max(1, round(best_s / step_s))
        why = (
            f"a save costs {cost_s:.3g} s of training, and a failure is expected every {_time(mtbf_s)} "
            f"({self._failures} seen in {_time(self._trained_s)}, prior {_time(self._prior_s)}): "
            f"the best interval is {_time(best_s)}, {every} steps of {step_s:.3g} s"
        )
        if every > most:
            every, why = most, f"{why}; limited by checkpoint.interval_limit_s = {self._config.interval_limit_s:g}"
        if every < least:
            every, why = least, f"{why}; limited by a save, which takes {least - 1} steps until it is durable"
        return Interval(every, cost_s, mtbf_s, why)

    def news(self) -> Interval | None:
        """The interval, if it differs by a tenth or more from the one that this returned last; else None."""
        if not self._costs_s:
            return None
        now = self.interval()
        if self._reported is not None and abs(now.every_steps / self._reported.every_steps - 1) < _REPORT_SHARE:
            return None
        self._reported = now
        return now

    def _end(self) -> None:
        beside, self._during = self._during or [], None
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
    """Daly's higher-order optimum: seconds of training from the end of one save to the begin of the next.

    τ = √(2δM) (1 + √(δ/2M)/3 + (δ/2M)/9) - δ for δ < 2M, else M (Daly 2006, *A higher order estimate of the optimum
    checkpoint interval for restart dumps*, eq. 37).

    Args:
        cost_s: δ, seconds of training that a save costs, >= 0.
        mtbf_s: M, mean seconds between failures, > 0.
    """
    ratio = cost_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def expected_mtbf_s(prior_s: float, failures: int, trained_s: float) -> float:
    """Mean seconds between failures, from a prior expectation and from what was seen.

    The loss is linear in the failure rate, so the rate's posterior mean counts. Failures are a Poisson process. The
    prior of its rate is a Gamma distribution with mean ``1 / prior_s``, which weighs as much as one failure seen in
    ``prior_s`` or, if that is longer than ``PRIOR_LIMIT_S``, as that fraction of a failure in ``PRIOR_LIMIT_S``: a run
    that fails every few minutes is soon believed. If nothing has failed yet, the result is no longer than the prior or
    the time trained, whichever is longer.

    Args:
        prior_s: the prior expectation, > 0.
        failures: number of failures seen.
        trained_s: seconds of training in which they were seen.
    """
    weight_s = min(prior_s, PRIOR_LIMIT_S)
    posterior_s = (weight_s + trained_s) / (weight_s / prior_s + failures)
    return min(posterior_s, max(prior_s, trained_s))
