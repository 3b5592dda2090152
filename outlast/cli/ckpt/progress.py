"""Progress of a verification: a bar with rate and time left on a terminal, a line now and then elsewhere."""

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

from outlast.cli.ckpt.output import size

LINE_EVERY_S = 10.0


class Verifying:
    """Call it with a step, the bytes verified so far and the total; leaving its ``with`` block removes the bar.

    Args:
        console: shows the bar, if it is a terminal.
        json: the output is for programs: show no bar.
        lines: takes the lines that replace a bar, at most one every ten seconds; None takes stderr.
        clock: the time in seconds.
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
        self._began_s = self._printed_s = 0.0

    def begin(self, step: int) -> None:
        """Start timing a step, before its first byte is read."""
        self._step, self._began_s, self._printed_s = step, self._clock(), self._clock()
        if self._bar is not None:
            self._tasks[step] = self._bar.add_task(f"verifying step {step}", total=None)

    def __call__(self, step: int, done_bytes: int, total_bytes: int) -> None:
        if step != self._step:
            self.begin(step)
        if self._bar is not None:
            self._bar.update(self._tasks[step], completed=done_bytes, total=total_bytes)
            return
        now_s = self._clock()
        if now_s - self._printed_s >= LINE_EVERY_S and 0 < done_bytes < total_bytes:
            self._printed_s = now_s
            rate = done_bytes / (now_s - self._began_s)
            print(
                f"step {step}: {size(done_bytes)} of {size(total_bytes)} verified ({done_bytes / total_bytes:.0%}), "
                f"{size(rate)}/s, {(total_bytes - done_bytes) / rate:.0f} s left",
                file=self._lines,
                flush=True,
            )

    def rate(self, done_bytes: int) -> str:
        """The time and rate of the step that was just verified: ``in 0.70 s, 1.1 GB/s``."""
        seconds = self._clock() - self._began_s
        return f"in {seconds:.2f} s, {size(done_bytes / max(seconds, 1e-9))}/s"

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
