"""Numbers on their way from a device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class OnItsWay:
    """A few numbers that travel to the host while the device goes on."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = numbers
        if numbers.device.type == "cuda":
            self._host = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._event = torch.cuda.current_stream(numbers.device).record_event()

    def value(self) -> float:
        """The only number, once it has come."""
        return self.values()[0]

    def values(self) -> list[float]:
        """All of them, once they have come."""
        if self._event is not None:
            self._event.synchronize()
        return [float(one) for one in self._host.reshape(-1).tolist()]
