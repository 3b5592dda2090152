"""What a save works with: the run it belongs to, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.format.zarr import root_document
from outlast.checkpoint.ownership.lease import Lease
from outlast.checkpoint.save.plan import RankPlan
from outlast.checkpoint.save.replicas import Replicas
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.io_threads import IoThreads
from outlast.events import Event


@dataclass(frozen=True)
class SaveContext:
    """One rank of one attempt: the same for all its saves."""

    store: Store
    config: CheckpointConfig
    rank: int
    world_size: int
    attempt_id: str
    """Equal on all ranks; votes of another attempt never count."""
    on_event: Callable[[Event], None]
    io: IoThreads
    """Read and write files."""
    lease: Lease
    """On the store's place; the coordinator takes it, and confirms it before anything counts."""


@dataclass(frozen=True)
class SaveRequest:
    """One save of one rank: what a call of ``Checkpointer.save`` asks of every tier."""

    step: int
    save_id: int
    """Number of the save within the attempt, equal on all ranks."""
    root: dict[str, Any]
    """Attributes of the root group."""
    plan: RankPlan
    """What this rank writes."""
    snapshot: Snapshot | None
    """Of the plan's parts. None: they were copied before, and the training thread has confirmed the copy."""
    replicas: Replicas
    """This rank's digests of what all ranks have, or some."""
    began: float
    """When the call began, on the monotonic clock."""
    durable: bool = True
    """Whether the save goes to storage."""
    replicate_now: bool = False
    """Whether the partner gets a copy even if none is due."""

    def without_tensors(self) -> SaveRequest:
        """The same request without references to the tensors, for whoever keeps it longer than they may be kept."""
        parts = tuple(replace(part, contents=()) for part in self.plan.parts)
        return replace(self, plan=replace(self.plan, parts=parts, pieces=()), snapshot=None)

    def root_document(self, context: SaveContext) -> bytes:
        """The root group's ``zarr.json``, which names the attempt and the save."""
        return root_document(self.root, self.step, context.world_size, context.attempt_id, self.save_id)
