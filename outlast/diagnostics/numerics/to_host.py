"""Scalars on their way from a device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class OnItsWay:
    """A scalar that travels to the host while the device goes on."""

    def __init__(self, scalar: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = scalar
        if scalar.device.type == "cuda":
            self._host = torch.empty_like(scalar, device="cpu", pin_memory=True).copy_(scalar, non_blocking=True)
            self._event = torch.cuda.current_stream(scalar.device).record_event()

    def value(self) -> float:
        """The scalar, once it has come."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
