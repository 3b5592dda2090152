"""FSDP2's parameter groups of a model, and how their gradients are laid out in its buffers.

FSDP2 has no public way to learn whose gradients are in the buffer of a custom reduce-scatter, so this reads private
attributes of its objects; a missing one is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from outlast.comm.compressors import Shape
from outlast.comm.compressors.base import numel_of, wire_dtype
from outlast.comm.exchange.sharded_session import ShardSession
from outlast.comm.slices import Cut
from outlast.comm.state.shards import ShardedParam
from outlast.errors import CommError


@dataclass(slots=True, eq=False)
class Group:
    """One ``fully_shard``'s parameters; ``inner`` is torch's FSDPParamGroup."""

    label: str
    module: Any
    inner: Any
    names: dict[int, str]
    """Of each of torch's FSDPParam objects, by id."""
    undo: list[Callable[[], None]]


def find_groups(module: nn.Module) -> list[Group]:
    """Every parameter group of FSDP2 in ``module``, in the order of its modules.

    Raises:
        CommError: see :func:`attach_fsdp`.
    """
    from torch.distributed.fsdp import FSDPModule  # seconds, and few need it

    names = {id(param): name for name, param in module.named_parameters()}
    groups: dict[int, Group] = {}
    for path, part in module.named_modules():
        if not isinstance(part, FSDPModule):
            continue
        inners = _param_groups(part._get_fsdp_state())
        if len(inners) > 1:
            raise CommError(
                f"fully_shard of {path or 'the model'} made {len(inners)} groups over several meshes",
                "call fully_shard once for the parameters of each mesh",
            )
        for inner in inners:
            if id(inner) not in groups and inner.fsdp_params:
                groups[id(inner)] = _group(path or "root", part, inner, names)
    if not groups:
        raise CommError(
            f"{type(module).__name__} has no parameters sharded by FSDP2",
            "call torch.distributed.fsdp.fully_shard on it first; for other models use outlast.comm.attach()",
        )
    shard_ranks = {tuple(dist.get_process_group_ranks(g.inner.mesh_info.shard_process_group)) for g in groups.values()}
    if len(shard_ranks) > 1:
        raise CommError(f"parts of the model are sharded over different ranks: {sorted(shard_ranks)}", "use one mesh")
    return list(groups.values())


def _param_groups(state: Any) -> Sequence[Any]:
    found = getattr(state, "_fsdp_param_groups", None)
    if found is None and hasattr(state, "_fsdp_param_group"):  # one or none, up to torch 2.11
        found = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    if found is None:
        raise unknown_torch("FSDPState has no _fsdp_param_groups")
    return found  # type: ignore[no-any-return]


def _group(label: str, module: Any, inner: Any, names: Mapping[int, str]) -> Group:
    for attribute in ("mesh_info", "mp_policy", "device", "_reduce_scatter_comm", "_all_reduce_hook"):
        if not hasattr(inner, attribute):
            raise unknown_torch(f"FSDPParamGroup has no {attribute}")
    if not hasattr(inner.mesh_info, "shard_process_group"):
        raise CommError(f"{label} is replicated, not sharded", "wrap the model in DistributedDataParallel")
    by_id = {}
    for param in inner.fsdp_params:
        if param.is_dtensor:
            raise CommError(
                f"a parameter of {label} was a DTensor before fully_shard (tensor parallel)",
                "only models that are sharded by FSDP2 alone can be compressed",
            )
        policy = inner.mp_policy
        for dtype in (policy.param_dtype, policy.reduce_dtype, param.sharded_param.dtype):
            if dtype == torch.float16:
                raise CommError(
                    f"{label} computes or reduces in float16, whose loss scaling error feedback cannot follow here",
                    "use bfloat16, or float32",
                )
        name = names.get(id(param.sharded_param))
        if name is None:
            raise CommError(
                f"a parameter of {label} is not among the model's named_parameters()",
                "call attach() on the outermost module, between steps",
            )
        by_id[id(param)] = name
    return Group(label, module, inner, by_id, [])


def copies_of(groups: Sequence[Group], replicas: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The ranks that hold copies of this rank's shards; None where there are none."""
    native = [getattr(group.inner.mesh_info, "replicate_process_group", None) for group in groups]
    ranks = {None if one is None else tuple(dist.get_process_group_ranks(one)) for one in native}
    if len(ranks) > 1:
        raise CommError("parts of the model have copies on different ranks", "use one mesh")
    if native[0] is not None and replicas is not None:
        raise CommError("both the mesh and the argument replicas say who holds copies", "leave out replicas")
    return replicas if native[0] is None else native[0]


def sharded_param(name: str, param: Any, session: ShardSession, *, of_copy: bool) -> ShardedParam:
    """How a parameter's gradient is laid out in the buffer.

    A gradient sharded along dimension d is cut there and its pieces joined end to end: with d = 0 that is the gradient.
    """
    local: Shape = tuple(param.sharded_size)
    orig: Shape = tuple(param._orig_size)
    dim, dtype = param.fsdp_placement.dim, param.sharded_param.dtype
    compress = session.states.compresses(orig)
    if of_copy:
        shape, own = local, 0
        cuts = [Cut(0, numel_of(local), local)]
    else:
        n, own = session.world_size, session.rank
        shape = orig if dim == 0 else (n * local[0], *local[1:])
        length = -(-shape[0] // n)
        inner = numel_of(shape[1:])
        edges = [min(index * length, shape[0]) for index in range(n + 1)]
        cuts = [Cut(a * inner, b * inner, (b - a, *shape[1:])) for a, b in pairwise(edges)]
    return ShardedParam(name, shape, wire_dtype(dtype), param.sharded_param.device, compress, tuple(cuts), own)


def with_gradient(group: Group) -> list[tuple[str, int]]:
    """(name, entries of a slice with its padding) of the parameters in a buffer, in the buffer's order."""
    return [
        (group.names[id(param)], numel_of(tuple(param.padded_sharded_param_size)))
        for param in group.inner.fsdp_params
        if param.sharded_param.requires_grad
    ]


def sharded_params(group: Group) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter as the optimizer has it) of those that get gradients."""
    return [
        (group.names[id(param)], param.sharded_param)
        for param in group.inner.fsdp_params
        if param.sharded_param.requires_grad
    ]


def unknown_torch(what: str) -> CommError:
    return CommError(
        f"torch {torch.__version__}: FSDP2 is not built as outlast knows it ({what})",
        "use a torch that outlast is tested with, 2.11 or 2.13",
    )
