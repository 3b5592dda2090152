"""What a restore is to give back: the running state's tensors, and of DTensors this rank's parts alone."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from outlast.checkpoint._agreement import Agreement
from outlast.checkpoint._dtensor import Meshes, is_dtensor, local_part, with_part
from outlast.checkpoint._names import readable
from outlast.checkpoint._shards import Box
from outlast.checkpoint._tree import check_same, tensors_of
from outlast.errors import CheckpointError, StateMismatch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Wanted:
    """The tensors of a running state.

    Args:
        like: nested; of the tensors only shapes, types and placements count.
        meshes: of its DTensors.
        fill: whether what is read goes into these very tensors.

    Attributes:
        boxes: this rank's parts of DTensors, by path relative to the step.
        fill: as above.
        digest: equal on all ranks that want the same.

    Raises:
        CheckpointError: a DTensor whose parts are no boxes, a key that cannot be, or a tensor that is to be filled and
            has no memory; names it.
    """

    def __init__(self, like: Mapping[str, Any], meshes: Meshes, fill: bool = False) -> None:
        self.fill = fill
        self.boxes: dict[str, Box] = {}
        self._like: dict[str, DTensor] = {}
        self._into: dict[str, torch.Tensor] = {}
        self._targets: dict[str, torch.Tensor] = {}
        self._names: dict[str, str] = {}
        self._described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        lines = []
        for path, name, tensor in tensors_of(like):
            placed = ""
            if fill:
                self._into[path], self._targets[path] = tensor, _memory_of(tensor, name)
            if is_dtensor(tensor):
                spread = meshes.spread(tensor, name)
                self._like[path], self.boxes[path], placed = tensor, spread.box, spread.placed
            self._names[path], self._described[path] = name, (tuple(tensor.shape), tensor.dtype)
            lines.append(f"{path} {tuple(tensor.shape)} {tensor.dtype} {placed} {fill}\n")
        self.digest = zlib.crc32("".join(sorted(lines)).encode())

    def check(self, have: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise :class:`StateMismatch` unless a step, given as shapes and types by path, has these tensors."""
        names = self._names
        check_same(
            {names.get(path) or readable(path): (shape, dtype) for path, (shape, dtype) in have.items()},
            {names[path]: described for path, described in self._described.items()},
        )

    def target(self, path: str) -> torch.Tensor | None:
        """Where this rank's part of a tensor is to be read to; None: to memory of its own."""
        return self._targets.get(path)

    def placed(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that was filled; a part that was read as the DTensor it is of; other tensors as they are."""
        if path in self._into:
            return self._into[path]
        return with_part(self._like[path], tensor) if path in self._like else tensor


def agree_on(
    like: Mapping[str, Any] | None, into: Mapping[str, Any] | None, meshes: Meshes, agreement: Agreement
) -> Wanted | None:
    """What all ranks want; collective.

    Ranks that want different parts would leave chunks unread, and so unverified, that all rely on.

    Raises:
        StateMismatch: ranks want different tensors or placements.
        CheckpointError: see :class:`Wanted`; on every rank, and says which rank found it.
    """
    problem, wanted = "", None
    try:
        if like is not None and into is not None:
            raise CheckpointError("restore was given both like and into", "pass one of the two")
        state = into if into is not None else like
        wanted = Wanted(state, meshes, fill=into is not None) if state is not None else None
    except CheckpointError as error:
        problem = str(error)
    for rank, text in enumerate(agreement.texts(problem)):
        if text:
            raise CheckpointError(f"rank {rank}: {text}")
    digest = -1 if wanted is None else wanted.digest
    differs = "" if agreement.from_coordinator(digest) == digest else "differs"
    ranks = [rank for rank, text in enumerate(agreement.texts(differs)) if text]
    if ranks:
        raise StateMismatch(
            f"ranks {ranks} restore into other tensors, shapes, types or placements than rank 0",
            "pass the same `like`, or `into`, on all ranks",
        )
    return wanted


def _memory_of(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """What this rank holds of a tensor, to write to."""
    part = local_part(tensor, name) if is_dtensor(tensor) else tensor.detach()
    if part.is_meta or any(stride == 0 < size - 1 for size, stride in zip(part.shape, part.stride(), strict=True)):
        reason = "is on the meta device" if part.is_meta else "has elements that share memory (it is expanded)"
        raise CheckpointError(f"{name!r} cannot be restored into: it {reason}", "pass `like`, or a tensor of its own")
    return part


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A copy of a part."""
    for d, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
        tensor = tensor.narrow(d, start, size)
    return tensor.clone(memory_format=torch.contiguous_format)
