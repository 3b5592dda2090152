"""Waiting for something that another rank puts into the store."""

from __future__ import annotations

import time

_FIRST_POLL_S = 0.005
_LAST_POLL_S = 0.25


class Poll:
    """Waits with growing pauses, up to a limit."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._pause_s = _FIRST_POLL_S

    def wait(self) -> bool:
        """Pause; False once the limit is over."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(self._pause_s, left_s))
        self._pause_s = min(self._pause_s * 1.5, _LAST_POLL_S)
        return True
