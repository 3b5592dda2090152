"""What a restore is asked for, which all ranks agree on before any byte is read, and what a rank restores with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outlast.checkpoint.format.names import step_name
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.peers.topology import node_name
from outlast.checkpoint.restore.messages import Ask, all_gather_messages
from outlast.checkpoint.state.boxes import Box
from outlast.checkpoint.state.dtensor import Meshes
from outlast.checkpoint.state.selection import EVERYTHING, Selection
from outlast.checkpoint.state.target import RestoreTarget
from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.local import LocalStore
from outlast.errors import CheckpointError, StateMismatch
from outlast.events import CheckpointRejected, Event

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger("outlast.checkpoint")


@dataclass(frozen=True)
class RestoreContext:
    """One rank, and what it restores with."""

    store: Store
    rank: int
    world_size: int
    agreement: Agreement
    on_event: Callable[[Event], None]
    io: Executor
    """Threads that read and verify."""

    def report(self, step: int, reason: str, file: str = "", *, damaged: bool = False) -> None:
        """Log and emit, once for all ranks, why a step or a copy of it is not used, and whether it is damaged."""
        if self.rank == 0:
            _log.warning("%s/%s: %s", step_name(step), file, reason)
            self.on_event(CheckpointRejected(step=step, reason=reason, file=file, damaged=damaged))

    def report_faults(self, step: int, faults: Iterable[Fault]) -> None:
        """As :meth:`report`, of damaged and missing files."""
        for fault in faults:
            self.report(step, f"{fault.kind.__name__}: {fault.reason}", fault.file, damaged=True)


@dataclass(frozen=True)
class RestoreRequest:
    """What all ranks ask for."""

    target: RestoreTarget | None
    """The running job's tensors; None: all tensors, whole."""
    any_world_size: bool
    """Whether a step saved by another world size may be taken."""
    read_once: bool
    """Whether what all ranks need from storage is read by one rank and sent to the others."""
    verify_other_ranks: bool = True
    """Whether local states of ranks that this job does not have are verified all the same."""
    selection: Selection = EVERYTHING
    """What is taken of the step."""

    @property
    def boxes(self) -> Mapping[str, Box]:
        """This rank's parts of DTensors, by path in the step; only as far as these are known before it is read."""
        return self.target.boxes if self.target is not None and self.selection.rename is None else {}


def agree_on_request(
    like: Mapping[str, Any] | None,
    into: Mapping[str, Any] | None,
    group: ProcessGroup | None,
    context: RestoreContext,
    *,
    any_world_size: bool,
    select: Callable[[], Selection] = lambda: EVERYTHING,
) -> RestoreRequest:
    """Make sure that all ranks ask for the same tensors; collective.

    Ranks that asked for different parts would leave chunks unread, and so unverified, that all rely on.

    Args:
        like: see :meth:`Checkpointer.restore`.
        into: likewise.
        group: of the DTensors' ranks; None takes the default group.
        context: of this rank.
        any_world_size: see :meth:`Checkpointer.restore`.
        select: makes the selection; may raise CheckpointError.

    Raises:
        StateMismatch: the tensors, placements or selections differ between ranks.
        CheckpointError: see :class:`RestoreTarget` and :func:`make_selection`; raised on every rank,
            and names the rank at fault.
    """
    target, selection = None, EVERYTHING
    ask = Ask(node_name())
    try:
        if like is not None and into is not None:
            raise CheckpointError("restore got both like and into", "pass one of the two")
        selection = select()
        ask = replace(ask, selection=selection.described)
        state = into if into is not None else like
        if state is not None:
            target = RestoreTarget(state, Meshes(group, context.world_size), fill=into is not None)
            ask = replace(ask, digest=target.digest)
    except CheckpointError as error:
        ask = replace(ask, problem=error.what, fix=error.fix)
    asks = [other for _, other in all_gather_messages(context.agreement, Ask, [ask])]
    for rank, other in enumerate(asks):
        if other.problem:
            raise CheckpointError(f"rank {rank}: {other.problem}", other.fix)
    ranks = [rank for rank, other in enumerate(asks) if other.digest != asks[0].digest]
    if ranks:
        raise StateMismatch(
            f"ranks {ranks} restore into other tensors, shapes, types or placements than rank 0",
            "pass the same `like`, or `into`, on all ranks",
        )
    ranks = [rank for rank, other in enumerate(asks) if other.selection != asks[0].selection]
    if ranks:
        raise StateMismatch(
            f"ranks {ranks} select by {asks[ranks[0]].selection}, rank 0 by {asks[0].selection}",
            "pass the same `parts`, `strict`, `rename` and `cast` on all ranks",
        )
    # Ranks of one node read a local disk once in any case, through the page cache.
    one_node = len({other.node for other in asks}) == 1
    return RestoreRequest(
        target, any_world_size, not (one_node and isinstance(context.store, LocalStore)), selection=selection
    )
