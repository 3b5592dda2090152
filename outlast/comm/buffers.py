"""Buffers that are used again and again, so that exchanges touch no fresh memory in a steady state."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

Buffer = Callable[[str, int], Tensor]
"""(use, nbytes) to a uint8 tensor of that size with undefined contents, the same one in every step."""

_local = threading.local()


def scratch(use: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor of ``numel`` undefined entries, shared by all calls of this thread with the same ``use``.

    It is valid until the next call with that ``use`` in the same thread; never keep one.
    """
    buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] | None = getattr(_local, "buffers", None)
    if buffers is None:
        buffers = _local.buffers = {}
    key = (use, dtype, device)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        buffer = buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel]


class BufferPool:
    """One reducer's buffers, by name.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def of(self, label: str, *, keep: bool) -> Buffer:
        """The buffers of the exchange ``label``, to be given to it alone.

        Args:
            label: no other exchange that is under way has it.
            keep: for the next step. Not in a warm-up, whose buffers are as large as the model.
        """

        def buffer(use: str, nbytes: int) -> Tensor:
            name = f"{label}/{use}"
            kept = self._buffers.get(name)
            if kept is None or kept.numel() < nbytes:
                kept = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                if keep:
                    self._buffers[name] = kept
            return kept[:nbytes]

        return buffer
