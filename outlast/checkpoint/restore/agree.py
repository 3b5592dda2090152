"""All ranks agree on what a restore is to read, before any byte is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.state.dtensor import Meshes
from outlast.checkpoint.state.target import RestoreTarget
from outlast.errors import CheckpointError, StateMismatch


def agree_on(
    like: Mapping[str, Any] | None, into: Mapping[str, Any] | None, meshes: Meshes, agreement: Agreement
) -> RestoreTarget | None:
    """What all ranks want; collective.

    Ranks that want different parts would leave chunks unread, and so unverified, that all rely on.

    Raises:
        StateMismatch: ranks want different tensors or placements.
        CheckpointError: see :class:`RestoreTarget`; on every rank, and says which rank found it.
    """
    problem, wanted = "", None
    try:
        if like is not None and into is not None:
            raise CheckpointError("restore was given both like and into", "pass one of the two")
        state = into if into is not None else like
        wanted = RestoreTarget(state, meshes, fill=into is not None) if state is not None else None
    except CheckpointError as error:
        problem = str(error)
    for rank, text in enumerate(agreement.all_gather_text(problem)):
        if text:
            raise CheckpointError(f"rank {rank}: {text}")
    digest = -1 if wanted is None else wanted.digest
    differs = "" if agreement.broadcast_int(digest) == digest else "differs"
    ranks = [rank for rank, text in enumerate(agreement.all_gather_text(differs)) if text]
    if ranks:
        raise StateMismatch(
            f"ranks {ranks} restore into other tensors, shapes, types or placements than rank 0",
            "pass the same `like`, or `into`, on all ranks",
        )
    return wanted
