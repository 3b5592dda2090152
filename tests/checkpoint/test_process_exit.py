"""What is told of the interpreter's exit shares the time that the exit may take."""

from __future__ import annotations

import os
import time

import pytest

from outlast.checkpoint import process_exit


class Slow:
    """Takes a while to end."""

    in_use = False

    def __init__(self, left: list[float]) -> None:
        self.pid = os.getpid()
        self._left = left

    def end_at_exit(self) -> None:
        self._left.append(process_exit.left_s(60))
        time.sleep(0.02)


def test_the_time_is_one_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_exit, "_open", {})
    left: list[float] = []
    for _ in range(3):
        process_exit.add(Slow(left))
    process_exit._end_all()
    first, second, third = left
    assert 60 >= first >= second + 0.02 >= third + 0.04
