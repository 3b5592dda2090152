"""Measures how long the parts of a step take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Starts when it is created; ``with timer("data"):`` adds to ``timer.seconds["data"]``."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the timer was created."""
        return time.perf_counter() - self._start_s
