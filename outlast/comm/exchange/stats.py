"""What a step's exchange cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from outlast.comm.feedback import Probe
from outlast.comm.transport.communicator import CollectiveTotals
from outlast.comm.transport.stream import DeviceStream


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceStats:
    """One step's gradient exchange on this rank."""

    wire_bytes: int
    """Bytes of messages that this rank sent, as the transport moves them, without headers."""
    dense_bytes: int
    """Bytes that a ring all-reduce of the same gradients in fp32 would have sent: 2 (n - 1) / n * 4 * entries."""
    codec_s: float
    """Time in compression and decompression, whether backward hides it or not."""
    collective_s: float
    """Time inside collectives, hidden or not: transfer, and the wait for the last rank to arrive."""
    exposed_s: float
    """From when the last gradient was ready until the last estimate was written: what backward did not hide."""
    collectives: int
    """How many collectives were issued."""
    skipped: bool = False
    """Whether some rank's scaled gradients overflowed, so that nothing was averaged."""
    alpha: float | None = None
    """Measured contraction over all tensors that this rank compressed: 1 - ||C(x) - x||^2 / ||x||^2; None in steps that
    do not measure it."""
    residual: float | None = None
    """What this rank holds back, relative to its gradients, over all tensors: ||e|| / ||g||, or where gradients are
    tracked ||g - h|| / ||g||; None in steps that do not measure it."""
    drift: float | None = None
    """How far the running mean of what ranks track had drifted from the exact one, ||h - mean h_i|| / ||mean h_i||, for
    the worst tensor; None in steps that did not replace it."""


class ReduceMeter:
    """Collects one step's :class:`ReduceStats`, from several threads.

    Args:
        stream: where codec work runs.
    """

    def __init__(self, stream: DeviceStream) -> None:
        self._stream = stream
        self.reset()

    def reset(self, probe: Probe | None = None) -> None:
        """A new step begins, measured with ``probe``."""
        self.numel = self.buckets = 0
        self.skipped = False
        self.probe = probe
        self.drift: float | None = None
        self._codec_s = self._first_ready_s = self._last_ready_s = self._last_done_s = self._blocked_s = 0.0

    def ready(self, numel: int) -> None:
        """Another bucket of ``numel`` gradients is ready."""
        self._last_ready_s = time.perf_counter()
        if not self.buckets:
            self._first_ready_s = self._last_ready_s
        self.numel += numel
        self.buckets += 1

    def done(self) -> None:
        """Another bucket's estimates are written."""
        self._last_done_s = time.perf_counter()

    @contextmanager
    def blocking(self, numel: int) -> Iterator[None]:
        """A context for an exchange of ``numel`` gradients that backward waits for."""
        started = time.perf_counter()
        yield
        self.numel += numel
        self._blocked_s += time.perf_counter() - started

    @contextmanager
    def codec(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """A context for codec work, in the stream behind ``after``; takes its time."""
        started = time.perf_counter()
        with torch.no_grad(), self._stream.work(after):
            yield
        self._codec_s += time.perf_counter() - started

    @property
    def exposed_s(self) -> float:
        """Seconds that backward did not hide."""
        return self._blocked_s + max(0.0, self._last_done_s - self._last_ready_s)

    @property
    def hiding_s(self) -> float:
        """Seconds from the first ready bucket to the last, which may hide an exchange."""
        return self._last_ready_s - self._first_ready_s

    def stats(self, totals: CollectiveTotals, dense_bytes: int) -> ReduceStats:
        """The step's figures.

        Args:
            totals: what its collectives have moved.
            dense_bytes: see :class:`ReduceStats`.
        """
        probe = self.probe if self.probe is not None and self.probe.gradient_square > 0 else None
        return ReduceStats(
            wire_bytes=totals.wire_bytes,
            dense_bytes=dense_bytes,
            codec_s=self._codec_s,
            collective_s=totals.collective_s,
            exposed_s=self.exposed_s,
            collectives=totals.collectives,
            skipped=self.skipped,
            alpha=probe.alpha_hat if probe else None,
            residual=probe.residual_ratio if probe else None,
            drift=self.drift,
        )
