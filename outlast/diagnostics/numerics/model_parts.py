"""A model as the watch sees it: without what is around it, by name, and who has it, too."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def bare(model: nn.Module) -> nn.Module:
    """The module itself, whose names do not depend on torch.compile and DDP around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return model


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it: of a DTensor its part, of a sparse tensor its values."""
    tensor = tensor.detach()
    part = getattr(tensor, "_local_tensor", None)
    tensor = part if isinstance(part, Tensor) else tensor
    return tensor._values() if tensor.is_sparse else tensor


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which ranks train one model together."""

    ranks: tuple[int, ...]
    """All of them; this rank alone if nothing says otherwise."""
    replicas: tuple[int, ...]
    """Those that must hold the same as this one."""
    is_sharded: bool
    why_none: str = ""
    """Why there are no replicas, in words; empty if there are."""


def sharing_of(model: nn.Module, ranks: tuple[int, ...] | None = None) -> Sharing:
    """What DDP or FSDP2 around or in the model says.

    Args:
        model: wrapped or not.
        ranks: that have replicas of it, where nothing around it says so.
    """
    if not dist.is_available() or not dist.is_initialized():
        return Sharing((0,), (0,), False, "there is one rank")
    me = dist.get_rank()
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is not None and any(isinstance(module, sharded) for module in model.modules()):
        return _of_shards(model, me)
    inner = getattr(model, "_orig_mod", model)
    if ranks is None and isinstance(inner, DistributedDataParallel):
        ranks = tuple(dist.get_process_group_ranks(inner.process_group))
    if ranks is None:
        return Sharing((me,), (me,), False, "nothing around the model says which ranks have replicas of it")
    return Sharing(ranks, ranks, False, "" if len(ranks) > 1 else "there is one rank")


def _of_shards(model: nn.Module, me: int) -> Sharing:
    from torch.distributed.tensor import DTensor, Replicate

    whole = [one for one in model.parameters() if isinstance(one, DTensor)]
    if not whole:
        return Sharing((me,), (me,), True, "FSDP2 has no parameters here")
    mesh, placements = whole[0].device_mesh, whole[0].placements
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    copies = [dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate)]
    if len(copies) != 1:
        return Sharing(
            ranks, (me,), True, f"FSDP2 shards parameters over all {len(ranks)} ranks, and none has what another has"
        )
    replicas = tuple(dist.get_process_group_ranks(mesh.get_group(copies[0])))
    return Sharing(ranks, replicas, True, "" if len(replicas) > 1 else "the mesh has one copy")
