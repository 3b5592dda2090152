"""Where gradient exchange runs on a device, beside the stream that computes.

On a CPU it is nothing but threads. On CUDA it is one side stream: work on a gradient is ordered behind the event that
marks the gradient as ready, and whoever waits for the result waits through the future's own event, or by
:meth:`DeviceStream.join`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceStream:
    """A side stream on one device; used by all threads of one reducer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event | None:
        """The point in the caller's stream after which its gradients are ready; None where there are no streams."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def work(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """A context for work in the stream, behind ``after``."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            yield

    def join(self) -> None:
        """Order what the caller's stream does next behind all that the lane was given so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def future(self) -> torch.futures.Future[torch.Tensor]:
        """A future whose waiters are ordered behind the stream."""
        if self._stream is None:
            return torch.futures.Future()
        return torch.futures.Future(devices=[self.device])
