"""Over whom a reducer averages: all ranks, or nodes whose ranks share fast links."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch.distributed as dist
from torch import Tensor

from outlast.comm.compressors import Shape
from outlast.comm.exchange.hierarchical import node_groups
from outlast.comm.slices import slice_shape
from outlast.comm.transport.communicator import CollectiveObserver, CollectiveTotals, Communicator
from outlast.errors import CommError


class Network:
    """The communicators of one reducer; **making one is a collective call**.

    Args:
        group: the ranks to average over; None for all.
        ranks_per_node: 1, or how many neighbours in rank order share fast links.
        timeout_s: limit of each collective, in seconds.
        observer: notified of every collective.
        stream: a context in which collectives run.

    Raises:
        CommError: no default process group, or a world size that is not a multiple of ``ranks_per_node``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranks_per_node: int,
        *,
        timeout_s: float,
        observer: CollectiveObserver | None,
        stream: Callable[[], AbstractContextManager[object]],
    ) -> None:
        whole = Communicator(group=group, timeout_s=timeout_s, observer=observer, stream=stream)
        self.all_ranks = whole
        self.intra_node: Communicator | None = None
        """This node's ranks; None if every rank compresses its own gradients."""
        self.inter_node = whole
        """Among whom compressed messages are exchanged: the ranks with this one's local rank, one of each node; all
        ranks if every rank compresses its own gradients."""
        if ranks_per_node == 1:
            return
        if whole.world_size % ranks_per_node:
            raise CommError(
                f"the world size {whole.world_size} is not a multiple of comm.ranks_per_node = {ranks_per_node}",
                "start the same number of ranks on every node, or set ranks_per_node = 1",
            )
        members = dist.get_process_group_ranks(whole.group)

        def beside(ranks: list[int]) -> Communicator:
            return Communicator(ranks=ranks, timeout_s=timeout_s, observer=observer, stream=stream, beside=whole)

        intra, inter = node_groups(members, dist.get_rank(), ranks_per_node)
        self.intra_node, self.inter_node = beside(intra), beside(inter)

    def shape_of(self, param: Tensor) -> Shape:
        """What this rank exchanges of a parameter: all of it, or its slice of the node's."""
        shape, node = tuple(param.shape), self.intra_node
        return shape if node is None else slice_shape(shape, node.rank, node.world_size)

    def take_totals(self) -> CollectiveTotals:
        """The totals of all groups since the last call; call it while no job runs."""
        total = self.all_ranks.take_totals()
        for part in self._parts():
            total = total.plus(part.take_totals())
        return total

    def leave(self, error: BaseException) -> None:
        """Give up after ``error``, and let the peers know why; see :meth:`Communicator.leave`."""
        for part in (*self._parts(), self.all_ranks):
            part.leave(error)

    def close(self) -> None:
        """Let queued jobs finish, then drop the process groups.

        Raises:
            CommError: a collective did not end within the limit.
        """
        self.all_ranks.close()
        for part in self._parts():
            part.close()

    def _parts(self) -> list[Communicator]:
        return [] if self.intra_node is None else [self.intra_node, self.inter_node]
