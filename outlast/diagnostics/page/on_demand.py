"""A value that is computed when somebody asks for it, and not too often."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

MOST_SHARE = 0.1
"""Of the time, at most this part is spent on computing."""
_LOG = logging.getLogger("outlast.page")


@dataclass(frozen=True, slots=True)
class Made(Generic[T]):
    """A value, and when its computation began."""

    value: T
    at_s: float
    """CLOCK_MONOTONIC seconds."""
    t: float
    """Seconds since the epoch."""
    cost_s: float
    """How long it took."""

    @property
    def age_s(self) -> float:
        """Seconds since its computation began."""
        return time.monotonic() - self.at_s


class OnDemand(Generic[T]):
    """Computes in a thread of its own, once for all who ask meanwhile. Thread-safe.

    Args:
        compute: what is computed. If it raises, the value before stays, and the next request tries again.
        least_age_s: a value this young is given out again. One that took long to compute is given out for so long that
            computing takes a tenth of the time at most.
        name: of the thread.
    """

    def __init__(self, compute: Callable[[], T], least_age_s: float, name: str) -> None:
        self._compute = compute
        self._least_age_s = least_age_s
        self._name = name
        self._changed = threading.Condition()
        self._is_busy = False
        self._next_s = 0.0
        self._made: Made[T] | None = None

    def get(self, wait_s: float) -> Made[T] | None:
        """The value, at most ``least_age_s`` old if it can be had within ``wait_s``; else an older one, or None."""
        with self._changed:
            if time.monotonic() < self._next_s:
                return self._made
            if not self._is_busy:
                self._is_busy = True
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            self._changed.wait_for(lambda: not self._is_busy, timeout=wait_s)
            return self._made

    def _run(self) -> None:
        began_s, began_t = time.monotonic(), time.time()
        made: Made[T] | None = None
        try:
            value = self._compute()
            made = Made(value, began_s, began_t, time.monotonic() - began_s)
        except Exception:
            _LOG.exception("outlast: the page of the run could not be computed; training goes on")
        finally:
            cost_s = time.monotonic() - began_s
            with self._changed:
                self._made = made or self._made
                self._next_s = began_s + max(self._least_age_s, cost_s / MOST_SHARE)
                self._is_busy = False
                self._changed.notify_all()
