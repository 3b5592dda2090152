"""A consistent copy of the state in host memory, made while training goes on (lazily, as DataStates-LLM does).

Forward and backward leave parameters and optimizer state alone, so their copy may run meanwhile, and only the update
has to wait for it. That nothing was changed before then is checked, not believed:

- ``Tensor._version``, which every in-place operation of PyTorch raises, and the address, recorded when the snapshot
  begins, are compared after each tensor's copy and again when the training thread asks to go on;
- fused optimizers and writes through ``.data`` or NumPy do not raise ``_version``. For tensors in host memory, a few
  elements spread over the tensor are recorded and compared too: no proof, but an update changes nearly all elements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from outlast.checkpoint._tree import Item
from outlast.errors import CheckpointError, SnapshotMutated

_ALIGNMENT_BYTES = 64
_SAMPLES = 16


class Arena:
    """Host memory that is kept from one snapshot to the next; it only ever grows."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size_bytes: int, *, pinned: bool) -> torch.Tensor:
        """At least this much memory; whatever an earlier call gave out is given out again.

        Returns:
            uint8, of shape (at least ``size_bytes``,); page-locked if ``pinned``.
        """
        if self._buffer.numel() < size_bytes or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self._buffer


class Snapshot:
    """Copies of some tensors. The constructor copies the eager ones, :meth:`copy` the others, one by one.

    Args:
        items: what to copy. Tensors that are not eager are held until :meth:`release`.
        arena: where to; it must not be reserved again while the copies are in use.

    Raises:
        CheckpointError: a lazy tensor of which changes cannot be told.
    """

    def __init__(self, items: Sequence[Item], arena: Arena) -> None:
        self.items = list(items)
        offsets, size_bytes = [], 0
        for item in self.items:
            offsets.append(size_bytes)
            size_bytes += -(-item.tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        accelerated = [item.tensor.device for item in self.items if item.tensor.device.type == "cuda"]
        buffer = arena.reserve(size_bytes, pinned=bool(accelerated))
        self.size_bytes = sum(item.tensor.nbytes for item in self.items)
        self._raw = [
            buffer[offset : offset + item.tensor.nbytes] for offset, item in zip(offsets, self.items, strict=True)
        ]
        self._marks = [None if item.eager else _Mark(item) for item in self.items]
        # Copies on the side stream wait for what the training thread has queued so far, and for nothing later.
        self._queued = {device: torch.cuda.current_stream(device).record_event() for device in set(accelerated)}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for index, item in enumerate(self.items):
            if item.eager:
                self._copy(index)

    def copy(self, index: int) -> None:
        """Copy one tensor, unless it was copied eagerly.

        Raises:
            SnapshotMutated: it was changed since the snapshot began.
        """
        mark = self._marks[index]
        if mark is not None:
            self._copy(index)
            mark.check()

    def check(self) -> None:
        """Check that no lazy tensor was changed since the snapshot began.

        Raises:
            SnapshotMutated: names the first that was.
        """
        for mark in self._marks:
            if mark is not None:
                mark.check()

    def release(self) -> None:
        """Let go of the tensors; the copies stay."""
        self._marks = [None] * len(self.items)
        self.items = [Item(item.path, item.name, item.tensor.new_empty(0), item.eager) for item in self.items]

    def data(self, index: int) -> memoryview:
        """The copied bytes of one tensor, in C order."""
        return self._raw[index].numpy().data

    def _copy(self, index: int) -> None:
        tensor = self.items[index].tensor
        if tensor.numel() == 0:
            return
        target = self._raw[index].view(tensor.dtype).view(tensor.shape)
        with torch.no_grad():
            if tensor.device not in self._queued:
                target.copy_(tensor)
                return
            stream = self._streams.get(tensor.device)
            if stream is None:
                stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
                stream.wait_event(self._queued[tensor.device])
            with torch.cuda.stream(stream):
                target.copy_(tensor, non_blocking=True)
            stream.synchronize()


class _Mark:
    """What a tensor was when the snapshot began."""

    def __init__(self, item: Item) -> None:
        if item.tensor.is_inference():
            raise CheckpointError(
                f"the tensor {item.name!r} was made in inference mode, so changes of it cannot be told",
                "name its top-level key in `eager`",
            )
        self._item = item
        self._version = item.tensor._version
        self._address = item.tensor.data_ptr()
        self._places = _places(item.tensor) if item.tensor.device.type == "cpu" else []
        self._sample = self._read()

    def check(self) -> None:
        tensor = self._item.tensor
        if tensor.data_ptr() != self._address:
            self._fail("its storage was replaced")
        if tensor._version != self._version:
            self._fail(f"_version {self._version} became {tensor._version}")
        if self._read() != self._sample:
            self._fail("its elements differ, though its _version does not")

    def _read(self) -> list[bytes]:
        width = self._item.tensor.itemsize
        return [ctypes.string_at(self._address + place, width) for place in self._places]

    def _fail(self, evidence: str) -> None:
        raise SnapshotMutated(
            f"the tensor {self._item.name!r} was changed before wait_copied() returned ({evidence})",
            "call wait_copied() before the optimizer's update and whatever else changes saved tensors, or name the "
            "top-level key of tensors that change earlier in `eager`",
        )


def _places(tensor: torch.Tensor) -> list[int]:
    """Byte offsets from ``data_ptr()`` of a few elements, evenly spread over the tensor, first and last included."""
    count = tensor.numel()
    samples = min(_SAMPLES, count)
    places = []
    for sample in range(samples):
        index = sample * (count - 1) // max(1, samples - 1)
        offset = 0
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            index, position = divmod(index, size)
            offset += position * stride
        places.append(offset * tensor.itemsize)
    return places
