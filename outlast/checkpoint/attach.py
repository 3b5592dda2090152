"""A Checkpointer in one call, for people with their own loop."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

import torch.distributed as dist

from outlast.checkpoint.checkpointer import Checkpointer
from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.peers.collectives import Agreement, check_ranks
from outlast.events import Event


def attach(
    url: str | os.PathLike[str],
    config: CheckpointConfig | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Checkpointer:
    """A :class:`Checkpointer` for the ranks of a process group, or for a single process; collective over the group.

    ::

        checkpointer = attach("runs/mine/checkpoints")

    Args:
        url: a path or any fsspec URL, shared by all ranks.
        config: None takes the defaults.
        group: whose ranks save together; None takes the default group, or this process alone if there is none.
        on_event: takes events, from the training thread and from background threads; without it, failed saves are still
            logged (logger ``outlast``).

    Raises:
        MissingDependency, ConfigError, CheckpointError: see :class:`Checkpointer`.
    """
    check_ranks(1, group, "outlast.checkpoint.attach")
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    token = Agreement(group, rank, world_size).broadcast_int(secrets.randbits(62))
    return Checkpointer(
        url,
        config if config is not None else CheckpointConfig(),
        rank=rank,
        world_size=world_size,
        attempt_id=f"{token:016x}",
        group=group,
        on_event=on_event if on_event is not None else _discard,
    )


def _discard(event: Event) -> None:
    """Discard events."""
