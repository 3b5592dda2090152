"""DTensors of FSDP2, HSDP and other meshes: this rank's part of them, and where it is in the whole tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist

from outlast.checkpoint.state.boxes import ShardLayout, Split, spread_over
from outlast.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor, without importing the class, which takes most of a second."""
    return isinstance(value, torch.Tensor) and hasattr(value, "full_tensor")


class Meshes:
    """The meshes of one job's DTensors.

    Args:
        group: its ranks are the job's; None takes the default group.
        world_size: ranks in the job.
    """

    def __init__(self, group: dist.ProcessGroup | None, world_size: int) -> None:
        self._group = group
        self._world_size = world_size
        self._known: dict[DeviceMesh, tuple[list[int], list[int]]] = {}
        self._spreads: dict[Any, ShardLayout] = {}

    def spread(self, tensor: DTensor, name: str) -> ShardLayout:
        """Where this rank's part is, and which ranks hold the same part.

        Raises:
            CheckpointError: a placement whose shards are not boxes of the tensor (a partial sum, ...), or a mesh that
                does not span all ranks of the job; names the tensor.
        """
        mesh, shape = tensor.device_mesh, tuple(tensor.shape)
        key = (mesh, tensor.placements, shape, _order(tensor))
        spread = self._spreads.get(key)
        if spread is None:
            if mesh not in self._known:
                # It spans all ranks, so this one has coordinates in it.
                self._known[mesh] = self._ranks(mesh, name), list(mesh.get_coordinate() or ())
            ranks, place = self._known[mesh]
            try:
                splits = [_split(placement) for placement in tensor.placements]
                if any(list(dims) != sorted(dims) for dims in _order(tensor)) and all(s.after == 1 for s in splits):
                    raise ValueError(
                        f"the dimensions of its mesh split it in the order {_order(tensor)}, not in their own"
                    )
                spread = spread_over(shape, tuple(mesh.shape), ranks, place, splits)
            except ValueError as error:
                raise CheckpointError(f"the shards of {name!r} cannot be stored: {error}") from error
            self._spreads[key] = spread
        local_shape = tuple(local_part(tensor, name).shape)
        if local_shape != spread.box.size:
            raise CheckpointError(
                f"the DTensor {name!r} {shape} has shape {local_shape} on this rank, expected {spread.box.size} for "
                f"its {spread.placed}",
                "only shards as torch.distributed.tensor makes them can be stored",
            )
        return spread

    def _ranks(self, mesh: DeviceMesh, name: str) -> list[int]:
        """The mesh's ranks as ranks of the job, in row-major order."""
        ranks: list[int] = mesh.mesh.flatten().tolist()
        if self._group is not None:
            members = dist.get_process_group_ranks(self._group)
            ranks = [members.index(rank) if rank in members else -1 for rank in ranks]
        if sorted(ranks) != list(range(self._world_size)):
            # Outside of a mesh of some ranks, others may hold a tensor of the same name, and both would write it.
            raise CheckpointError(
                f"the mesh of {name!r} spans ranks {sorted(ranks)}, the job has {self._world_size}",
                "shard over a mesh of all ranks (add a replicating dimension if needed), or put the tensor's "
                "to_local() into local",
            )
        return ranks


def local_part(tensor: DTensor, name: str) -> torch.Tensor:
    """This rank's part, not a copy; raises :class:`CheckpointError` if it is not a plain tensor."""
    with torch.no_grad():
        local = tensor.to_local()
    if type(local) not in (torch.Tensor, torch.nn.Parameter):
        raise CheckpointError(
            f"this rank's part of {name!r} is a {type(local).__module__}.{type(local).__qualname__}",
            "only plain tensors can be stored; wait for pending collectives, or store the tensors it consists of",
        )
    return local.detach()


def with_part(like: DTensor, local: torch.Tensor) -> DTensor:
    """A DTensor placed as ``like``, with ``local`` as this rank's part (on the CPU, whatever the mesh's device)."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # from_local would move it to the mesh's device. FSDP2 makes the DTensors that it offloads in the same way.
    stride = torch.empty(like.shape, device="meta").stride()
    meta = TensorMeta(like.shape, stride, local.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _order(tensor: DTensor) -> tuple[tuple[int, ...], ...]:
    """The order in which the mesh's dimensions split each of the tensor's, if this torch records it."""
    return tuple(tuple(entry.mesh_dims) for entry in getattr(tensor._spec, "shard_order", None) or ())


def _split(placement: object) -> Split:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    if isinstance(placement, Replicate):
        return Split(None)
    if isinstance(placement, _StridedShard):
        return Split(placement.dim, int(placement.split_factor))
    if isinstance(placement, Shard):
        return Split(placement.dim)
    raise ValueError(f"its placement is {placement}; only Shard and Replicate define which elements a rank holds")
