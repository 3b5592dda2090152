"""A consistent copy of the state in host memory, made while training goes on (lazily, as DataStates-LLM does).

Forward and backward leave parameters and optimizer state alone, so their copy may run meanwhile, and only the update
has to wait for it. That nothing was changed before then is checked, not believed:

- ``Tensor._version``, which every in-place operation of PyTorch raises, and the address, recorded when the snapshot
  begins, are compared after each tensor's copy and again when the training thread asks to go on;
- fused and compiled optimizers, foreach optimizers of DTensors, CUDA graphs, and writes through ``.data`` or NumPy do
  not raise ``_version``. So a few elements spread over each tensor are recorded and compared too: no proof, but an
  update changes nearly all elements. On a CUDA device that is done in the device's own order of work, once before and
  once after the copies (:mod:`outlast.checkpoint.save.fingerprint`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import crc32c
import torch

from outlast.checkpoint.format.records import CRC_BYTES
from outlast.checkpoint.save.device import DeviceCopier, DeviceRoom, hold
from outlast.checkpoint.save.parts import Content, Part
from outlast.checkpoint.state.tree import TensorEntry
from outlast.errors import CheckpointError, SnapshotMutated

_SAMPLES = 16
_WHOLE_BYTES = 64
"""Contiguous tensors up to this size are compared whole, which is one read."""
_SMALL_BYTES = 64 << 10
"""Contiguous tensors up to this size are copied without PyTorch, each call of which takes longer than the copy."""
_ZEROS = bytes(64)
_STRIDE_BYTES = 512 << 10
"""Copied and checksummed at a time, so that what is checksummed is in the processor's cache."""


class Snapshot:
    """Copies of some tensors, part by part.

    Tensors on a CUDA device are copied by a stream of their own: parts are begun one after the other (:meth:`start`)
    and taken as they arrive (:meth:`copy`). Eager ones are copied on the device first, where it has room to spare, so
    that training need not wait for their way to the host.

    Args:
        parts: what to copy. The tensors are referenced until they are copied, or :meth:`release`.
        room: of the device, for eager tensors; None: there is none.

    Raises:
        CheckpointError: a lazy tensor whose changes cannot be detected.
    """

    def __init__(self, parts: Sequence[Part], room: DeviceRoom | None = None) -> None:
        self._marks: dict[int, _Mark] = {}
        lazy: dict[torch.device, list[TensorEntry]] = {}
        for part in parts:
            for content in part.contents:
                device = content.source.device
                if device.type == "cuda":
                    lazy.setdefault(device, [])
                if not part.eager and id(content.item) not in self._marks:
                    self._marks[id(content.item)] = _Mark(content.item)
                    if device.type == "cuda":
                        lazy[device].append(content.item)
        self._parts: list[Part | None] = list(parts)
        held = _hold_eager(self._parts, room) if room is not None and lazy else set()
        urgent = [part.eager and index not in held for index, part in enumerate(parts)]
        self.urgent = sum(urgent)
        """How many parts must be copied before any of their tensors may change; the first of :attr:`order`."""
        self.order = sorted(range(len(parts)), key=lambda index: not urgent[index])
        """The order in which parts are to be copied."""
        self._layouts = [_Layout(part) for part in parts]
        self._devices = {device: DeviceCopier(device, items) for device, items in lazy.items()}
        self._begun: dict[int, list[torch.cuda.Event]] = {}
        self._left = len(parts)

    @property
    def pinned(self) -> bool:
        """Whether copies come from an accelerator, and their target should be page-locked."""
        return bool(self._devices)

    @property
    def runs_ahead(self) -> bool:
        """Whether further parts should be begun while one is taken."""
        return bool(self._devices)

    def wait_read(self) -> bool:
        """Wait until all that was begun has left its device; whether no tensor is read any more then. The checksums may
        still be to come.

        Raises:
            SnapshotMutated: a tensor on a device was changed since the snapshot began.
        """
        for copier in self._devices.values():
            copier.wait()
        if self._left:
            return False
        self._check_devices()
        return not any(self._layouts[index].on_host for index, part in enumerate(self._parts) if part is not None)

    def start(self, index: int, target: torch.Tensor) -> None:
        """Begin to copy a part's tensors that lie on a device; each part once, all of them before the last is taken.

        Args:
            index: of the part.
            target: see :meth:`copy`.
        """
        part = self._parts[index]
        assert part is not None
        used = []
        for content in part.contents:
            copier = self._devices.get(content.source.device)
            if copier is not None:
                if content.source.numel():
                    copier.copy(
                        _corner(content, target[content.offset : content.offset + content.nbytes]), content.source
                    )
                used.append(copier)
        self._begun[index] = [copier.event() for copier in dict.fromkeys(used)]
        self._left -= 1
        if not self._left:
            for copier in self._devices.values():
                copier.end()

    def copy(self, index: int, target: torch.Tensor, *, verify: bool = False) -> int:
        """Copy one part, or take what :meth:`start` began, and let go of its tensors.

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
        if index not in self._begun:
            self.start(index, target)
        for event in self._begun.pop(index):
            event.synchronize()
        payload = target[: self._layouts[index].nbytes]
        part = self._parts[index]
        marks = [self._marks.get(id(content.item)) for content in part.contents] if part is not None else []
        for mark in marks:
            if mark is not None:
                mark.check_place()  # memory that was freed must not be read
        crc, at, view = 0, 0, payload.numpy().data
        with torch.no_grad():
            for number, (offset, nbytes, on_device) in enumerate(self._layouts[index].pieces):
                if offset > at:
                    gap = offset - at
                    view[at:offset] = zeros = _ZEROS[:gap] if gap <= len(_ZEROS) else bytes(gap)
                    crc = crc32c.crc32c(zeros, crc)
                at = offset + nbytes
                if nbytes <= _SMALL_BYTES and not on_device:
                    assert part is not None
                    small = _bytes_of(part.contents[number], nbytes)
                    if small is not None:
                        view[offset:at] = small
                        before, crc = crc, crc32c.crc32c(small, crc)
                        if verify and crc32c.crc32c(view[offset:at], before) != crc:
                            raise _differs(part.contents[number].item, 0)
                        continue
                piece = payload[offset:at]
                if on_device:
                    crc = crc32c.crc32c(piece.numpy().data, crc) if nbytes else crc
                else:
                    assert part is not None
                    try:
                        crc = self._copy(part.contents[number], piece, crc, verify)
                    except RuntimeError:
                        if (mark := marks[number]) is not None:
                            mark.check_place()  # that it was resized meanwhile tells more than what PyTorch ran into
                        raise
            crc = _zero(payload[at:], crc)
        for mark in marks:
            if mark is not None:
                mark.check()
        trailer = target[len(payload) :].numpy()
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
        self._check_devices()

    def release(self) -> None:
        """Let go of the tensors; those of which the copy has begun are read no more on return."""
        for copier in self._devices.values():
            copier.wait()
        self._marks = {}
        self._parts = [None] * len(self._parts)

    def _check_devices(self) -> None:
        for copier in self._devices.values():
            changed = copier.changed() if copier.ended else None
            if changed is not None:
                raise _mutated(changed.name, "its elements differ, though its _version does not")

    def _copy(self, content: Content, target: torch.Tensor, crc: int, verify: bool) -> int:
        """Of a tensor in the host's memory."""
        source = content.source
        if not source.numel():
            return crc
        if not content.block and source.is_contiguous() and not source.is_conj() and not source.is_neg():
            raw = source.reshape(-1).view(torch.uint8)
            data, copy = raw.numpy().data, target.numpy().data
            for at in range(0, len(data), _STRIDE_BYTES):
                target[at : at + _STRIDE_BYTES].copy_(raw[at : at + _STRIDE_BYTES])
                before, crc = crc, crc32c.crc32c(data[at : at + _STRIDE_BYTES], crc)
                if verify and crc32c.crc32c(copy[at : at + _STRIDE_BYTES], before) != crc:
                    if id(content.item) in self._marks:
                        self._marks[id(content.item)].check()  # a change tells more than a difference
                    raise _differs(content.item, at)
            return crc
        _corner(content, target).copy_(source)
        return crc32c.crc32c(target.numpy().data, crc)


def _bytes_of(content: Content, nbytes: int) -> bytes | None:
    """The elements of a small tensor in the host's memory, end to end; None if PyTorch has to copy them."""
    source = content.source
    if content.block or not source.is_cpu or not source.is_contiguous() or source.is_conj() or source.is_neg():
        return None
    return ctypes.string_at(source.data_ptr(), nbytes) if nbytes else b""


def _differs(item: TensorEntry, at: int) -> CheckpointError:
    return CheckpointError(
        f"the copy of the tensor {item.name!r} differs from it at byte {at} or after",
        "the tensor was changed while it was copied, or this host's memory is faulty",
    )


class _Layout:
    """What is needed of a part once its tensors were let go of."""

    def __init__(self, part: Part) -> None:
        self.nbytes = part.nbytes
        self.pieces = [
            (content.offset, content.nbytes if content.source.numel() else 0, content.source.device.type == "cuda")
            for content in part.contents
        ]
        self.on_host = not all(on_device for _, _, on_device in self.pieces)


def _hold_eager(parts: list[Part | None], room: DeviceRoom) -> set[int]:
    """Copy eager tensors on their devices, and put the copies in their place; the parts that need not be waited for."""
    found: dict[torch.device, list[tuple[int, int, Content]]] = {}
    for index, part in enumerate(parts):
        if part is not None and part.eager and part.contents:
            for number, content in enumerate(part.contents):
                if content.source.device.type == "cuda" and content.source.numel():
                    found.setdefault(content.source.device, []).append((index, number, content))
    copied: set[tuple[int, int]] = set()
    for contents in found.values():
        copies = hold([content.source for _, _, content in contents], room)
        for (index, number, content), copy in zip(contents, copies or (), strict=copies is not None):
            part = parts[index]
            assert part is not None
            replaced = list(part.contents)
            replaced[number] = content._replace(source=copy)
            parts[index] = replace(part, contents=tuple(replaced))
            copied.add((index, number))
    return {
        index
        for index, part in enumerate(parts)
        if part is not None
        and part.eager
        and all((index, number) in copied or not c.source.numel() for number, c in enumerate(part.contents))
    }


def _corner(content: Content, target: torch.Tensor) -> torch.Tensor:
    """Where in the host's memory a tensor's elements go."""
    if not content.block:
        return target.view(content.source.dtype).view(content.source.shape)
    corner = target.zero_().view(content.source.dtype).view(content.block)
    for d, size in enumerate(content.source.shape):
        corner = corner.narrow(d, 0, size)
    return corner


def _zero(target: torch.Tensor, crc: int) -> int:
    """Zero some memory, and go on with the checksum."""
    return crc32c.crc32c(target.zero_().numpy().data, crc) if target.numel() else crc


class _Mark:
    """What a tensor was when the snapshot began."""

    __slots__ = ("_address", "_item", "_places", "_sample", "_storage_bytes", "_version", "_width")

    def __init__(self, item: TensorEntry) -> None:
        tensor = item.tensor
        if tensor.is_inference():
            raise CheckpointError(
                f"the tensor {item.name!r} was made in inference mode, so changes to it cannot be detected",
                "name its top-level key in `eager`",
            )
        self._item = item
        self._version = self._versions()
        self._address = tensor.data_ptr()
        self._storage_bytes = tensor.untyped_storage().nbytes()
        self._places: Sequence[int] = ()
        self._width = tensor.itemsize
        if tensor.device.type == "cpu" and tensor.numel():
            nbytes = tensor.numel() * self._width
            if nbytes <= _WHOLE_BYTES and tensor.is_contiguous():
                self._places, self._width = (0,), nbytes
            else:
                self._places = _places(tuple(tensor.shape), tensor.stride(), self._width)
        self._sample = self._read()

    def check_place(self) -> None:
        tensor = self._item.tensor
        if tensor.data_ptr() != self._address or tensor.untyped_storage().nbytes() != self._storage_bytes:
            self._fail("its storage was freed, resized or replaced")

    def check(self) -> None:
        self.check_place()
        version = self._versions()
        if version != self._version:
            self._fail(f"_version {self._version} became {version}")
        if self._read() != self._sample:
            self._fail("its elements differ, though its _version does not")

    def _versions(self) -> int | tuple[int, int]:
        own = self._item.tensor._version
        return own if self._item.dtensor is None else (own, self._item.dtensor._version)

    def _read(self) -> list[bytes]:
        address, width = self._address, self._width
        return [ctypes.string_at(address + place, width) for place in self._places]

    def _fail(self, evidence: str) -> None:
        raise _mutated(self._item.name, evidence)


def _mutated(name: str, evidence: str) -> SnapshotMutated:
    return SnapshotMutated(
        f"the tensor {name!r} was changed before wait_copied() returned ({evidence})",
        "call wait_copied() before the optimizer's update and whatever else changes saved tensors, or name the "
        "top-level key of tensors that change earlier in `eager`",
    )


@lru_cache(maxsize=4096)
def _places(shape: tuple[int, ...], strides: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Byte offsets from ``data_ptr()`` of a few elements, evenly spread over a tensor, first and last included."""
    count = math.prod(shape)
    samples = min(_SAMPLES, count)
    places = []
    for sample in range(samples):
        index = sample * (count - 1) // max(1, samples - 1)
        offset = 0
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            index, position = divmod(index, size)
            offset += position * stride
        places.append(offset * width)
    return tuple(places)
