"""Copies from a CUDA device into the memory of the host, on a stream of their own, while the device computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outlast.checkpoint.save.fingerprint import Fingerprint
from outlast.checkpoint.state.tree import TensorEntry

_ALIGNMENT_BYTES = 512
_SPARE_SHARE = 0.1
"""Of a device's memory, what is left to training when room is taken for eager tensors."""


class DeviceRoom:
    """Device memory into which tensors that may change at once are copied: some milliseconds for what takes the way to
    the host a tenth of a second. Once taken it is kept for the next save."""

    def __init__(self) -> None:
        self._held: dict[torch.device, Tensor] = {}

    def take(self, device: torch.device, nbytes: int) -> Tensor | None:
        """(nbytes,) uint8, the same from save to save; None: the device has not that much to spare."""
        held = self._held.get(device)
        if held is None or held.numel() < nbytes:
            self._held.pop(device, None)
            free_bytes, total_bytes = torch.cuda.mem_get_info(device)
            if nbytes > free_bytes - _SPARE_SHARE * total_bytes:
                return None
            try:
                held = torch.empty(nbytes, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                return None
            self._held[device] = held
        return held[:nbytes]

    def clear(self) -> None:
        """Give it back."""
        self._held = {}


def hold(sources: Sequence[Tensor], room: DeviceRoom) -> list[Tensor] | None:
    """Copies of tensors of one device, on that device, in the order of the caller's stream; None: no room for them."""
    sizes = [-(-source.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for source in sources]
    memory = room.take(sources[0].device, sum(sizes))
    if memory is None:
        return None
    copies = [
        piece[: source.nbytes].view(source.dtype).view(source.shape)
        for piece, source in zip(memory.split_with_sizes(sizes), sources, strict=True)
    ]
    with torch.no_grad():
        torch._foreach_copy_(copies, [source.detach() for source in sources])
    return copies


class DeviceCopier:
    """The copies of one snapshot from one device.

    Args:
        device: whose tensors.
        lazy: what must not change before the last copy is done.
    """

    def __init__(self, device: torch.device, lazy: Sequence[TensorEntry]) -> None:
        self._device = device
        self._lazy = lazy
        self._fingerprint = Fingerprint([item.tensor for item in lazy])
        # Copies wait for what the training thread has queued so far, and for nothing later.
        self._queued = torch.cuda.current_stream(device).record_event()
        self._stream: torch.cuda.Stream | None = None
        self._differ: Tensor | None = None
        self._ended: torch.cuda.Event | None = None

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy; ``source`` must stay until an event that is recorded later."""
        with torch.cuda.stream(self._lane()):
            target.copy_(source, non_blocking=target.is_contiguous())  # else it goes through another buffer

    def event(self) -> torch.cuda.Event:
        """Is reached when all copies so far are done."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._lane())
        return event

    def end(self) -> None:
        """No more copies come."""
        with torch.cuda.stream(self._lane()):
            differ = self._fingerprint.compare()
            self._differ = torch.empty(differ.shape, dtype=differ.dtype, pin_memory=True)
            self._differ.copy_(differ, non_blocking=True)
        self._ended = self.event()

    @property
    def ended(self) -> bool:
        """Whether all copies are done."""
        return self._ended is not None and bool(self._ended.query())  # type: ignore[no-untyped-call]

    def changed(self) -> TensorEntry | None:
        """A lazy tensor that was changed before all copies were done; waits for them."""
        if self._ended is None or self._differ is None:
            return None
        self._ended.synchronize()
        index = self._fingerprint.first(self._differ)
        return None if index is None else self._lazy[index]

    def wait(self) -> None:
        """Wait for all copies that have begun."""
        if self._stream is not None:
            self.event().synchronize()

    def _lane(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._stream.wait_event(self._queued)
        return self._stream
