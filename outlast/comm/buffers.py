"""Buffers that a thread uses again and again, so that the codec touches no fresh memory in a steady state."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(use: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor of ``numel`` undefined entries, shared by all calls of this thread with the same ``use``.

    It is valid until the next call with that ``use`` in the same thread; never keep one.
    """
    buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] | None = getattr(_local, "buffers", None)
    if buffers is None:
        buffers = _local.buffers = {}
    key = (use, dtype, device)
    held = buffers.get(key)
    if held is None or held.numel() < numel:
        held = buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return held[:numel]
