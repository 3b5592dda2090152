"""What a restore returns: the running state's tensors, and of DTensors only this rank's parts."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from outlast.checkpoint.state.boxes import Box
from outlast.checkpoint.state.containers import close_container
from outlast.checkpoint.state.dtensor import Meshes, is_dtensor, local_part, with_part
from outlast.checkpoint.state.matching import TensorType
from outlast.checkpoint.state.tensors import as_plain
from outlast.checkpoint.state.tree import tensors_of
from outlast.checkpoint.state.wrappers import check_wrapper
from outlast.errors import CheckpointError, StateMismatch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class RestoreTarget:
    """The tensors of a running state.

    Args:
        like: nested; of its tensors only shapes, dtypes and placements matter.
        meshes: of its DTensors.
        fill: whether to read into these very tensors.

    Attributes:
        boxes: this rank's parts of DTensors, by path relative to the step.
        fill: as above.
        names: of the tensors, by path.
        types: shapes and dtypes, by path.
        digest: equal on ranks whose targets have the same tensors.

    Raises:
        CheckpointError: a DTensor whose parts are not boxes, an invalid key, or a tensor to fill that has no memory;
            names it.
    """

    def __init__(self, like: Mapping[str, Any], meshes: Meshes, fill: bool = False) -> None:
        self.fill = fill
        self.boxes: dict[str, Box] = {}
        self._like: dict[str, DTensor] = {}
        self._into: dict[str, torch.Tensor] = {}
        self._targets: dict[str, torch.Tensor] = {}
        self.names: dict[str, str] = {}
        self.types: dict[str, TensorType] = {}
        lines = []
        self._wrappers: dict[str, tuple[str, torch.Tensor]] = {}
        self._inner: defaultdict[str, list[str]] = defaultdict(list)
        for path, name, tensor in tensors_of(like, self._wrappers):
            placed = ""
            if fill:
                self._into[path], self._targets[path] = tensor, _memory_of(tensor, name)
            if is_dtensor(tensor):
                spread = meshes.spread(tensor, name)
                self._like[path], self.boxes[path], placed = tensor, spread.box, spread.placed
            above = path.rpartition("/")[0] if self._wrappers else ""
            while above:
                if above in self._wrappers:
                    self._inner[above].append(path)
                above = above.rpartition("/")[0]
            self.names[path], self.types[path] = name, TensorType(tuple(tensor.shape), tensor.dtype)
            lines.append(f"{path} {tuple(tensor.shape)} {tensor.dtype} {placed} {fill}\n")
        self.digest = zlib.crc32("".join(sorted(lines)).encode())

    def check_wrappers(self, shapes: Mapping[str, dict[str, Any]], taken: Mapping[str, str]) -> dict[str, str]:
        """Check that the wrappers of which inner tensors are taken are those of this state.

        Args:
            shapes: of the step's groups, by path.
            taken: by the path of a saved tensor, the path of the running one.

        Returns:
            The paths of running wrappers, by the paths of the groups that they are in the step.

        Raises:
            StateMismatch: a wrapper is of another class, context, shape or dtype, or not all of it is taken.
        """
        old_of = {new: old for old, new in taken.items()}
        found: dict[str, str] = {}
        for path, inner in self._inner.items():
            name, running = self._wrappers[path]
            olds = set()
            for new in inner:
                if new in old_of:
                    above = old_of[new].split("/")[: path.count("/") - new.count("/")]
                    olds.add("/".join(above))
            if not olds:
                continue  # all of it is missing, which the matching has judged
            old = min(olds)
            if len(olds) > 1 or not all(new in old_of for new in inner) or old not in shapes:
                raise StateMismatch(
                    f"{name!r} is a {type(running).__qualname__} of {len(inner)} tensors, which the checkpoint does "
                    "not have as one",
                    "restore into the state as it was when the step was saved, or leave this tensor out with `rename`",
                )
            check_wrapper(shapes[old], running, name)
            found[old] = path
        return found

    def wrapper(self, path: str, shape: dict[str, Any], inner: dict[Any, Any]) -> Any:
        """The running wrapper at a path, which was filled, or one like it of these inner tensors."""
        _, running = self._wrappers[path]
        return running if self.fill else close_container(shape, inner, running, stand_ins=False)

    def target(self, path: str) -> torch.Tensor | None:
        """The memory to read this rank's part of a tensor into; None: new memory."""
        return self._targets.get(path)

    def placed(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """The running tensor, if it was filled; the DTensor of a part that was read; other tensors unchanged."""
        if path in self._into:
            return self._into[path]
        return with_part(self._like[path], tensor) if path in self._like else tensor


def _memory_of(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """This rank's part of a tensor, to write to."""
    part = local_part(tensor, name) if is_dtensor(tensor) else tensor
    if not part.is_meta:
        part = as_plain(part, name)
    if part.is_meta or any(stride == 0 < size - 1 for size, stride in zip(part.shape, part.stride(), strict=True)):
        reason = "is on the meta device" if part.is_meta else "is expanded, so its elements share memory"
        raise CheckpointError(
            f"{name!r} cannot be restored into: it {reason}", "pass `like`, or a tensor with memory of its own"
        )
    return part


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A copy of a part."""
    for d, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
        tensor = tensor.narrow(d, start, size)
    return tensor.clone(memory_format=torch.contiguous_format)
