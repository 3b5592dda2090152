"""Spikes of a loss or a norm: far above what the last steps had, told once, with restraint."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

from outlast.diagnostics.numerics.events import NumericsSpike

_LEAST = 16
"""Values before anything is judged."""
_SIGMA = 1.4826
"""Standard deviations of a normal distribution in a median absolute deviation."""
_QUIET = 3
"""Steps without a spike that end one."""
_LEVEL = 32
"""A spike that lasts so many steps is a new level."""


@dataclass(frozen=True, slots=True)
class Spike:
    """A value far above the others."""

    first_step: int
    last_step: int
    value: float
    """The largest of it."""
    baseline: float
    """The median of the steps before."""
    sigmas: float
    """By how many standard deviations it is above that."""
    is_over: bool
    """Whether values are as they were before; else the spike has just begun, or what it was is the level now."""
    is_level: bool = False


class Spikes:
    """Watches one series of numbers.

    A value is far off if it is ``sigmas`` standard deviations above the median of the ``window`` steps before, by their
    median absolute deviation, and ``least`` above it. What is far off does not enter the window.

    Args:
        window: steps.
        sigmas: of which a spike is.
        least: share of the median above it that a spike is at least; 2 is three times the median.
        in_logs: deviations are of the logarithms: of norms, which vary by factors.
    """

    def __init__(self, window: int, sigmas: float, least: float, *, in_logs: bool = False) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._sigmas = sigmas
        self._least = least
        self._in_logs = in_logs
        self._open: Spike | None = None
        self._meanwhile: list[float] = []

    def look(self, step: int, value: float) -> Spike | None:
        """The next value; a spike when one begins, and when it is over. What is not finite is not looked at."""
        if not math.isfinite(value):
            return None
        if len(self._values) < _LEAST:
            self._values.append(value)
            return None
        baseline = median(self._values)
        sigmas = self._sigmas_above(value, baseline)
        is_far = sigmas >= self._sigmas and value - baseline >= self._least * abs(baseline)
        if self._open is None:
            if not is_far:
                self._values.append(value)
                return None
            self._open = Spike(step, step, value, baseline, sigmas, is_over=False)
            self._meanwhile = [value]
            return self._open
        now = self._open
        self._meanwhile.append(value)
        if is_far:
            higher = value > now.value
            now = Spike(
                now.first_step,
                step,
                max(value, now.value),
                now.baseline,
                sigmas if higher else now.sigmas,
                is_over=False,
            )
            self._open = now
            if step - now.first_step < _LEVEL:
                return None
            self._values.clear()
            self._values.extend(self._meanwhile)
            self._open = None
            return Spike(now.first_step, step, now.value, now.baseline, now.sigmas, is_over=False, is_level=True)
        self._values.append(value)
        if step - now.last_step < _QUIET:
            return None
        self._open = None
        return Spike(now.first_step, now.last_step, now.value, now.baseline, now.sigmas, is_over=True)

    def _sigmas_above(self, value: float, baseline: float) -> float:
        """With a spread of zero, as of a constant, anything above is infinitely far off; ``least`` still counts."""
        seen = list(self._values)
        if self._in_logs and min(seen) > 0 and value > 0:
            seen, value = [math.log(one) for one in seen], math.log(value)
            baseline = median(seen)
        spread = _SIGMA * median(abs(one - baseline) for one in seen)
        above = value - baseline
        if above <= 0:
            return 0.0
        return above / spread if spread > 0 else math.inf


def spike_event(step: int, name: str, spike: Spike) -> NumericsSpike:
    """What a spike of ``name`` is told as, in step ``step``."""
    state = "over" if spike.is_over else "level" if spike.is_level else "began"
    length = spike.last_step - spike.first_step + 1
    far = f"{spike.sigmas:.0f} standard deviations" if math.isfinite(spike.sigmas) else "far"
    value = f"{spike.value:.4g}, {far} above {spike.baseline:.4g}, the median of the steps before"
    told = {
        "began": f"the {name} is {value}",
        "over": f"the {name} is as before again, after {length} step{'s' if length > 1 else ''} of up to {value}",
        "level": f"the {name} has stayed far above what it was for {length} steps: up to {value}",
    }[state]
    return NumericsSpike(
        step=step,
        what=name,
        value=spike.value,
        baseline=spike.baseline,
        sigmas=spike.sigmas if math.isfinite(spike.sigmas) else None,
        first_step=spike.first_step,
        last_step=spike.last_step,
        state=state,
        told=told,
    )
