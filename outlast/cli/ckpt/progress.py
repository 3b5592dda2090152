"""How far verifying is: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_EVERY_S = 10.0


def size(count: float) -> str:
    """Bytes for people: ``17.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class Verifying:
    """Called with a step, its bytes verified so far and in all; for a ``with``, which takes the bar away.

    Args:
        console: gets the bar, if it is a terminal.
        json: what the console gets is for programs: no bar.
        lines: gets lines where there is no bar, at most one in ten seconds, so none for a step that is quickly done.
        clock: seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        json: bool,
        lines: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bar: Progress | None = None
        if console.is_terminal and not json:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._lines = sys.stderr if lines is None else lines
        self._clock = clock
        self._tasks: dict[int, TaskID] = {}
        self._step: int | None = None
        self._began_s = self._told_s = 0.0

    def begin(self, step: int) -> None:
        """Before the first byte of a step is read."""
        self._step, self._began_s, self._told_s = step, self._clock(), self._clock()
        if self._bar is not None:
            self._tasks[step] = self._bar.add_task(f"verifying step {step}", total=None)

    def __call__(self, step: int, done_bytes: int, total_bytes: int) -> None:
        if step != self._step:
            self.begin(step)
        if self._bar is not None:
            self._bar.update(self._tasks[step], completed=done_bytes, total=total_bytes)
            return
        now_s = self._clock()
        if now_s - self._told_s >= _EVERY_S and 0 < done_bytes < total_bytes:
            self._told_s = now_s
            rate = done_bytes / (now_s - self._began_s)
            print(
                f"step {step}: {size(done_bytes)} of {size(total_bytes)} verified ({done_bytes / total_bytes:.0%}), "
                f"{size(rate)}/s, {(total_bytes - done_bytes) / rate:.0f} s left",
                file=self._lines,
                flush=True,
            )

    def rate(self, done_bytes: int) -> str:
        """Of the step that was just verified: ``in 0.70 s, 1.1 GB/s``."""
        seconds = self._clock() - self._began_s
        return f"in {seconds:.2f} s, {size(done_bytes / max(seconds, 1e-9))}/s"

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
