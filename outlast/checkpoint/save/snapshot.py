"""A consistent copy of the state in host memory, made while training goes on (lazily, as DataStates-LLM does).

Forward and backward leave parameters and optimizer state alone, so their copy may run meanwhile, and only the update
has to wait for it. That nothing was changed before then is checked, not believed:

- ``Tensor._version``, which every in-place operation of PyTorch raises, and the address, recorded when the snapshot
  begins, are compared after each tensor's copy and again when the training thread asks to go on;
- fused optimizers, foreach optimizers of DTensors, compiled optimizer steps, CUDA graphs, and writes through ``.data``
  or NumPy do not raise ``_version``. So a few elements spread over each tensor are recorded and compared too: no proof,
  but an update changes nearly all elements. Of tensors on a GPU they are gathered in the training thread's stream when
  the snapshot begins, and in the copying stream behind the last copy; neither holds the training thread up.

From a GPU the copies run ahead of the checksums: as many are queued as there is host memory for, and the tensors are
let go of when the last has arrived, whatever is left to checksum.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import crc32c
import torch

from outlast.checkpoint.format.records import CRC_BYTES
from outlast.checkpoint.save.device_sample import SAMPLES, DeviceSample, mutated
from outlast.checkpoint.save.plan import Content, Part
from outlast.checkpoint.state.tree import TensorEntry
from outlast.errors import CheckpointError

_STRIDE_BYTES = 512 << 10
"""Copied and checksummed at a time, so that what is checksummed is in the processor's cache."""


class Snapshot:
    """Copies of some tensors, part by part.

    Args:
        parts: what to copy. The tensors are held until :meth:`release`.

    Raises:
        CheckpointError: a lazy tensor of which changes cannot be told.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts: list[Part | None] = list(parts)
        self._marks: dict[int, _Mark] = {}
        for part in parts:
            for content in part.contents:
                if not part.eager and id(content.item) not in self._marks:
                    self._marks[id(content.item)] = _Mark(content.item)
        devices = {content.source.device for part in parts for content in part.contents}
        accelerated = sorted({device for device in devices if device.type == "cuda"}, key=str)
        items = {id(mark.item): mark.item for mark in self._marks.values()}.values()
        self._samples = {
            device: DeviceSample([item for item in items if item.tensor.device == device]) for device in accelerated
        }
        # Copies on the side stream wait for what the training thread has queued so far, and for nothing later.
        self._queued = {device: torch.cuda.current_stream(device).record_event() for device in accelerated}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._arrived: dict[int, list[torch.cuda.Event]] = {}
        """By part: when its copies from GPUs are there."""
        self._behind: list[torch.cuda.Event] | None = None
        """When the last copies, and the samples behind them, are there; None before they are queued."""

    @property
    def pinned(self) -> bool:
        """Whether copies come from an accelerator, and their target should be page-locked."""
        return bool(self._queued)

    def queue(self, index: int, target: torch.Tensor) -> None:
        """Begin to copy what one part has of GPUs' tensors; returns at once. For the thread that calls :meth:`copy`.

        Args:
            index: of the part; all parts in order.
            target: as for :meth:`copy`, page-locked; not to be read before :meth:`copy` has returned.
        """
        part = self._parts[index]
        assert part is not None
        used = []
        with torch.no_grad():
            for content in part.contents:
                device = content.source.device
                if device not in self._queued or not content.source.numel():
                    continue
                with torch.cuda.stream(self._stream(device)):
                    corner = _corner(content, target[content.offset : content.offset + content.nbytes])
                    corner.copy_(content.source, non_blocking=not content.block)  # a corner goes through another buffer
                if device not in used:
                    used.append(device)
        self._arrived[index] = [self._stream(device).record_event() for device in used]
        if index + 1 == len(self._parts):
            for sample in self._samples.values():
                sample.take_again(self._stream(sample.device))
            self._behind = [self._stream(device).record_event() for device in self._queued]

    def let_go(self, *, wait: bool = False) -> bool:
        """Whether all copies from GPUs have arrived, so that the tensors may change.

        Args:
            wait: until they have.

        Raises:
            SnapshotMutated: a tensor was changed since the snapshot began.
        """
        if self._behind is None:
            return False
        for event in self._behind:
            if wait:
                event.synchronize()
            elif not event.query():  # type: ignore[no-untyped-call]
                return False
        for sample in self._samples.values():
            sample.check()
        self.check()
        return True

    def copy(self, index: int, target: torch.Tensor, *, verify: bool = False) -> int:
        """Copy one part, or wait for what :meth:`queue` began to copy; checksum it, and let go of its tensors.

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
        for event in self._arrived.pop(index, []):
            event.synchronize()
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

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_event(self._queued[device])
        return stream

    def _copy(self, content: Content, target: torch.Tensor, crc: int, verify: bool) -> int:
        source = content.source
        if not source.numel():
            return crc
        if source.device in self._queued:
            return crc32c.crc32c(target.numpy().data, crc)  # it is there: see queue()
        corner = _corner(content, target)
        if not content.block and source.is_contiguous() and not source.is_conj() and not source.is_neg():
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


def _corner(content: Content, target: torch.Tensor) -> torch.Tensor:
    """The place of some content in its target: all of it, or a corner of a block whose rest becomes zero."""
    source = content.source
    if not content.block:
        return target.view(source.dtype).view(source.shape)
    corner = target.zero_().view(source.dtype).view(content.block)
    for d, size in enumerate(source.shape):
        corner = corner.narrow(d, 0, size)
    return corner


def _zero(target: torch.Tensor, crc: int) -> int:
    """Zero some memory, and go on with the checksum."""
    return crc32c.crc32c(target.zero_().numpy().data, crc) if target.numel() else crc


class _Mark:
    """What a tensor was when the snapshot began."""

    def __init__(self, item: TensorEntry) -> None:
        if item.tensor.is_inference():
            raise CheckpointError(
                f"the tensor {item.name!r} was made in inference mode, so changes of it cannot be told",
                "name its top-level key in `eager`",
            )
        self.item = item
        self._watched = [item.tensor] if item.dtensor is None else [item.tensor, item.dtensor]
        self._versions = [tensor._version for tensor in self._watched]
        self._address = item.tensor.data_ptr()
        self._places = _places(item.tensor) if item.tensor.device.type == "cpu" else []
        self._sample = self._read()

    def check(self) -> None:
        tensor = self.item.tensor
        if tensor.data_ptr() != self._address:
            self._fail("its storage was replaced")
        versions = [tensor._version for tensor in self._watched]
        if versions != self._versions:
            self._fail(f"_version {self._versions} became {versions}")
        if self._read() != self._sample:
            self._fail("its elements differ, though its _version does not")

    def _read(self) -> list[bytes]:
        width = self.item.tensor.itemsize
        return [ctypes.string_at(self._address + place, width) for place in self._places]

    def _fail(self, evidence: str) -> None:
        raise mutated(self.item.name, evidence)


def _places(tensor: torch.Tensor) -> list[int]:
    """Byte offsets from ``data_ptr()`` of a few elements, evenly spread over the tensor, first and last included."""
    count = tensor.numel()
    samples = min(SAMPLES, count)
    places = []
    for sample in range(samples):
        index = sample * (count - 1) // max(1, samples - 1)
        offset = 0
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            index, position = divmod(index, size)
            offset += position * stride
        places.append(offset * tensor.itemsize)
    return places
