"""The log line that rank 0 prints every few steps."""

from __future__ import annotations

import logging
import math
import time
from datetime import timedelta

from outlast.events import StepDone

_LOG = logging.getLogger("outlast.progress")


class Progress:
    """Averages steps and logs a line every ``every_steps``.

    Args:
        every_steps: steps per line; the first and the last step also get one.
        last_step: the step at which training ends.
        world_size: ranks; each processes as many tokens as this one.
        flops_per_token: FLOPs of forward and backward.
        peak_tflops: of one rank's device; None shows achieved GFLOP/s instead of MFU.
        quiet: log nothing; for all ranks but rank 0.
    """

    def __init__(
        self,
        *,
        every_steps: int,
        last_step: int,
        world_size: int,
        flops_per_token: float,
        peak_tflops: float | None,
        quiet: bool = False,
    ) -> None:
        self._every_steps = every_steps
        self._last_step = last_step
        self._world_size = world_size
        self._flops_per_token = flops_per_token
        self._peak_tflops = peak_tflops
        self._quiet = quiet
        self._window: list[StepDone] = []
        self._seen = 0
        self._measured_from: tuple[int, float] | None = None

    def step(self, done: StepDone) -> None:
        """Count a step, and log a line if one is due."""
        self._seen += 1
        self._window.append(done)
        if self._seen == 3:  # the first steps include allocation and warm-up
            self._measured_from = (done.step, time.monotonic())
        if self._seen == 1 or done.step % self._every_steps == 0 or done.step == self._last_step:
            if not self._quiet:
                _LOG.info(self._line(done))
            self._window.clear()

    def _line(self, done: StepDone) -> str:
        seconds = sum(d.step_s for d in self._window)
        tokens_per_s = sum(d.tokens for d in self._window) / seconds
        flops_per_s = tokens_per_s * self._flops_per_token
        if self._peak_tflops is None:
            speed = f"{flops_per_s / 1e9:7.1f} GFLOP/s"
        else:
            speed = f"MFU {flops_per_s / 1e12 / self._peak_tflops:6.1%}"
        width = len(str(self._last_step))
        return (
            f"step {done.step:{width}}/{self._last_step}  "
            f"loss {sum(math.nan if d.loss is None else d.loss for d in self._window) / len(self._window):7.4f}  "
            f"{_norm(done)}  lr {done.lr:.2e}  "
            f"{seconds / len(self._window) * 1e3:7.1f} ms  {tokens_per_s * self._world_size:9,.0f} tok/s  {speed}  "
            f"comm {sum(d.comm_s for d in self._window) / seconds:4.0%}  "
            f"ckpt {sum(d.checkpoint_s for d in self._window) / seconds:4.0%}  "
            f"ETA {self._eta(done.step)}"
        )

    def _eta(self, step: int) -> str:
        if self._measured_from is None or step <= self._measured_from[0]:
            return "-:--:--"
        first, since_s = self._measured_from
        per_step_s = (time.monotonic() - since_s) / (step - first)
        return str(timedelta(seconds=round(per_step_s * (self._last_step - step))))


def _norm(done: StepDone) -> str:
    """``|g|``: norm of the averaged gradient; ``|u|``: of the averaged update, where updates are averaged."""
    if done.update_norm is not None:
        return f"|u| {done.update_norm:7.1f}"
    return f"|g| {math.nan if done.grad_norm is None else done.grad_norm:7.3f}"
