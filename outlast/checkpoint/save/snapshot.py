"""A consistent copy of the state in host memory, made while training goes on (lazily, as DataStates-LLM does).

Forward and backward leave parameters and optimizer state alone, so their copy may run meanwhile, and only the update
has to wait for it. That nothing was changed before then is checked, not believed:

- ``Tensor._version``, which every in-place operation of PyTorch raises, and the address, recorded when the snapshot
  begins, are compared after each tensor's copy and again when the training thread asks to go on;
- fused optimizers, foreach optimizers of DTensors, and writes through ``.data`` or NumPy do not raise ``_version``. For
  tensors in host memory, a few elements spread over the tensor are recorded and compared too: no proof, but an update
  changes nearly all elements.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import crc32c
import torch

from outlast.checkpoint.format.records import CRC_BYTES
from outlast.checkpoint.save.parts import Content, Part
from outlast.checkpoint.state.tree import TensorEntry
from outlast.errors import CheckpointError, SnapshotMutated

_SAMPLES = 16
_STRIDE_BYTES = 512 << 10
"""Copied and checksummed at a time, so that what is checksummed is in the processor's cache."""


class Snapshot:
    """Copies of some tensors, part by part.

    Args:
        parts: what to copy. The tensors are referenced until :meth:`release`.

    Raises:
        CheckpointError: a lazy tensor whose changes cannot be detected.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts: list[Part | None] = list(parts)
        self._marks: dict[int, _Mark] = {}
        for part in parts:
            for content in part.contents:
                if not part.eager and id(content.item) not in self._marks:
                    self._marks[id(content.item)] = _Mark(content.item)
        devices = {content.source.device for part in parts for content in part.contents}
        accelerated = {device for device in devices if device.type == "cuda"}
        # Copies on the side stream wait for what the training thread has queued so far, and for nothing later.
        self._queued = {device: torch.cuda.current_stream(device).record_event() for device in accelerated}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def pinned(self) -> bool:
        """Whether copies come from an accelerator, and their target should be page-locked."""
        return bool(self._queued)

    def copy(self, index: int, target: torch.Tensor, *, verify: bool = False) -> int:
        """Copy one part, and let go of its tensors.

        Args:
            index: of the part.
            target: uint8, at least the part's bytes and its checksum long. The payload, its CRC32C (little-endian) and
                zeros are written to it.
            verify: read the copy again while it is in the processor's cache, and compare its checksum.

        Returns:
            CRC32C of the payload; of a contiguous tensor in host memory it is the *source's*, taken while it is copied.

        Raises:
            SnapshotMutated: a tensor was changed since the snapshot began.
            CheckpointError: the copy is not what was copied (``verify``).
        """
        part = self._parts[index]
        assert part is not None
        payload = target[: part.nbytes]
        crc, at = 0, 0
        with torch.no_grad():
            for content in part.contents:
                if content.offset > at:
                    crc = _zero(payload[at : content.offset], crc)
                at = content.offset + content.nbytes
                crc = self._copy(content, payload[content.offset : at], crc, verify)
                mark = self._marks.get(id(content.item))
                if mark is not None:
                    mark.check()
            crc = _zero(payload[at:], crc)
        trailer = target[part.nbytes :].numpy()
        trailer[:] = 0
        trailer[:CRC_BYTES] = memoryview(crc.to_bytes(CRC_BYTES, "little"))
        self._parts[index] = None
        return crc

    def check(self) -> None:
        """Check that no lazy tensor was changed since the snapshot began.

        Raises:
            SnapshotMutated: names the first that was.
        """
        for mark in self._marks.values():
            mark.check()

    def release(self) -> None:
        """Let go of the tensors."""
        self._marks = {}
        self._parts = [None] * len(self._parts)

    def _copy(self, content: Content, target: torch.Tensor, crc: int, verify: bool) -> int:
        source = content.source
        if not source.numel():
            return crc
        if content.block:
            corner = target.zero_().view(source.dtype).view(content.block)
            for d, size in enumerate(source.shape):
                corner = corner.narrow(d, 0, size)
        else:
            corner = target.view(source.dtype).view(source.shape)
        if source.device in self._queued:
            stream = self._streams.get(source.device)
            if stream is None:
                stream = self._streams[source.device] = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]
                stream.wait_event(self._queued[source.device])
            with torch.cuda.stream(stream):
                corner.copy_(source, non_blocking=not content.block)  # into a corner it goes through another buffer
            stream.synchronize()
        elif not content.block and source.is_contiguous() and not source.is_conj() and not source.is_neg():
            raw = source.reshape(-1).view(torch.uint8)
            data, copy = raw.numpy().data, target.numpy().data
            for at in range(0, len(data), _STRIDE_BYTES):
                target[at : at + _STRIDE_BYTES].copy_(raw[at : at + _STRIDE_BYTES])
                before, crc = crc, crc32c.crc32c(data[at : at + _STRIDE_BYTES], crc)
                if verify and crc32c.crc32c(copy[at : at + _STRIDE_BYTES], before) != crc:
                    if id(content.item) in self._marks:
                        self._marks[id(content.item)].check()  # a change tells more than a difference
                    raise CheckpointError(
                        f"the copy of the tensor {content.item.name!r} differs from it at byte {at} or after",
                        "the tensor was changed while it was copied, or this host's memory is faulty",
                    )
            return crc
        else:
            corner.copy_(source)
        return crc32c.crc32c(target.numpy().data, crc)


def _zero(target: torch.Tensor, crc: int) -> int:
    """Zero some memory, and go on with the checksum."""
    return crc32c.crc32c(target.zero_().numpy().data, crc) if target.numel() else crc


class _Mark:
    """What a tensor was when the snapshot began."""

    def __init__(self, item: TensorEntry) -> None:
        if item.tensor.is_inference():
            raise CheckpointError(
                f"the tensor {item.name!r} was made in inference mode, so changes to it cannot be detected",
                "name its top-level key in `eager`",
            )
        self._item = item
        self._watched = [item.tensor] if item.dtensor is None else [item.tensor, item.dtensor]
        self._versions = [tensor._version for tensor in self._watched]
        self._address = item.tensor.data_ptr()
        self._places = _places(item.tensor) if item.tensor.device.type == "cpu" else []
        self._sample = self._read()

    def check(self) -> None:
        tensor = self._item.tensor
        if tensor.data_ptr() != self._address:
            self._fail("its storage was replaced")
        versions = [tensor._version for tensor in self._watched]
        if versions != self._versions:
            self._fail(f"_version {self._versions} became {versions}")
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
