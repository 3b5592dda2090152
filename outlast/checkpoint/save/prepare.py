"""From the state that a program passes to what each tier is asked to save."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist

from outlast.checkpoint.format.names import rank_name
from outlast.checkpoint.format.records import CRC_BYTES
from outlast.checkpoint.memory.arena import Arena
from outlast.checkpoint.save.device import DeviceRoom
from outlast.checkpoint.save.plan import plan_rank
from outlast.checkpoint.save.replicas import Replicas
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.save.source import TensorSource
from outlast.checkpoint.save.storage_save import StorageSave
from outlast.checkpoint.state.dtensor import Meshes
from outlast.checkpoint.state.tree import StateTree, lay_out


def make_request(
    context: SaveContext,
    group: dist.ProcessGroup | None,
    room: DeviceRoom,
    step: int,
    save_id: int,
    *,
    replicated: Mapping[str, Any],
    local: Mapping[str, Any],
    eager: Collection[str],
    began: float,
    durable: bool,
    replicate_now: bool,
) -> SaveRequest:
    """Lay the state out, divide it, and begin its snapshot. No collective is issued.

    Args:
        context: who saves.
        group: over all ranks, for the meshes of DTensors; None takes the default group.
        room: on the devices, for copies of eager tensors.
        step: of the state.
        save_id: number of the save within the attempt.
        replicated: state that is equal on all ranks; nested keys to tensors and JSON values.
        local: this rank's own.
        eager: top-level keys whose tensors may change as soon as they are copied.
        began, durable, replicate_now: see :class:`SaveRequest`.

    Raises:
        CheckpointError: a key, value, dtype or placement that cannot be stored; names it.
    """
    with _collector_paused():
        of_all, own = StateTree(), StateTree()
        lay_out(of_all, replicated, "", eager, Meshes(group, context.world_size))
        lay_out(own, local, rank_name(context.rank), eager)
        plan = plan_rank(
            of_all,
            own,
            context.rank,
            context.world_size,
            chunk_bytes=int(context.config.chunk_mb * 1e6),
            pack_below_bytes=int(context.config.pack_below_kb * 1e3),
        )
        snapshot = Snapshot(plan.parts, room)
        compared = context.config.compare_replicas if context.world_size > 1 else "off"
        replicas = Replicas(plan.pieces, of_all.groups, compared, step)
    return SaveRequest(step, save_id, of_all.groups[""], plan, snapshot, replicas, began, durable, replicate_now)


def make_storage_save(context: SaveContext, request: SaveRequest, arena: Arena) -> StorageSave:
    """A save straight from the tensors to storage, through an arena; not started yet."""
    plan, snapshot = request.plan, request.snapshot
    assert snapshot is not None
    sizes = [part.nbytes + CRC_BYTES for part in plan.parts]
    reserve = partial(arena.reserve, sizes, pinned=snapshot.pinned)
    source = TensorSource(plan, snapshot, arena, prepare=lambda: (request.replicas.digests(), reserve()))
    return StorageSave(context, request, source)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without Python's cyclic garbage collector.

    Laying out many tensors makes many objects and no garbage; looking for it again and again takes half of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
