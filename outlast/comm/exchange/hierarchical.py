"""Dense inside a node, compressed between nodes.

The ranks of a node share links that need no compression. Each takes one slice of rows of every tensor. It gets the
node's mean of the slice by an all-to-all, averages it over the inter-node group (the ranks of all nodes with its local
rank) in the way that settings say, and hands the result to its node by an all-gather. So a node sends each gradient
over its network link once, and error feedback is spread over the node's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from outlast.comm.buffers import Buffer
from outlast.comm.compressors.base import flat
from outlast.comm.direction import Direction
from outlast.comm.exchange.exchange import Exchange
from outlast.comm.exchange.item import Item, Presence, Stage
from outlast.comm.slices import slices
from outlast.comm.state.parameters import ParamState
from outlast.comm.transport.communicator import Communicator, mean_in_rank_order


class HierarchicalExchange:
    """The exchange of some tensors over all nodes.

    Args:
        label: what it is, the same on every rank.
        states: of the parameters; their shapes are those of this rank's slices.
        grads: whole gradients, overwritten with the estimates.
        direction: see :class:`Item`.
        scale: the factor in the gradients, to be taken out and put back.
        node: the ranks of this node.
        inner: makes the exchange over the inter-node group, of this rank's slices.
        buffer: provides the buffers.
        presence: see :class:`Item`; one for each tensor.
    """

    def __init__(
        self,
        label: str,
        states: Sequence[ParamState],
        grads: Sequence[Tensor],
        direction: Direction | None,
        scale: float,
        node: Communicator,
        inner: Callable[[list[Item]], Exchange],
        buffer: Buffer,
        presence: Sequence[Presence | None],
    ) -> None:
        self._label = label
        self._grads = list(grads)
        self._scale = scale
        self._node = node
        self._buffer = buffer
        self._dtype = states[0].dtype
        self._parts = [slices(_rows(grad), node.world_size) for grad in grads]
        entries = [sum(part[j].numel() for part in self._parts) for j in range(node.world_size)]
        self._nbytes = [count * self._dtype.itemsize for count in entries]
        self._largest = max(self._nbytes)
        self._own = buffer("own", self._largest)
        """(largest,) uint8: this rank's slices, first as gradients and then as estimates."""
        pieces = self._split(self._own, node.rank)
        items = [
            Item(state, g.view(state.shape), direction, presence=present)
            for state, g, present in zip(states, pieces, presence, strict=True)
        ]
        self._exchange = inner(items)
        self._sent = self._received = self._gathered = self._own

    def stages(self) -> list[Stage]:
        """The work, in order."""
        return [
            Stage("codec", self._pack),
            Stage("wire", self._collect),
            Stage("codec", self._average),
            *self._exchange.stages(),
            Stage("wire", self._share),
            Stage("codec", self._unpack),
        ]

    def _pack(self) -> None:
        self._sent = self._buffer("to node", sum(self._nbytes))
        start = 0
        for rank, nbytes in enumerate(self._nbytes):
            for part, piece in zip(self._parts, self._split(self._sent[start : start + nbytes], rank), strict=True):
                piece.copy_(flat(part[rank]))
                if self._scale != 1.0:
                    piece.div_(self._scale)
            start += nbytes

    def _collect(self) -> None:
        n, own = self._node.world_size, self._nbytes[self._node.rank]
        out = self._buffer("from node", n * own).view(n, own)
        self._received = self._node.all_to_all(self._sent, self._nbytes, f"{self._label} in node", out)

    def _average(self) -> None:
        mean = mean_in_rank_order(self._received.view(self._dtype))
        self._own[: self._nbytes[self._node.rank]].view(self._dtype).copy_(mean)

    def _share(self) -> None:
        n = self._node.world_size
        out = self._buffer("all of node", n * self._largest).view(n, self._largest)
        self._gathered = self._node.all_gather(self._own, f"{self._label} in node", out)

    def _unpack(self) -> None:
        for rank, row in enumerate(self._gathered):
            for part, piece in zip(self._parts, self._split(row, rank), strict=True):
                part[rank].copy_(piece.view(part[rank].shape))
        if self._scale != 1.0:
            for grad in self._grads:
                grad.mul_(self._scale)

    def _split(self, row: Tensor, rank: int) -> list[Tensor]:
        """The flat pieces of one rank's slices, as views of its bytes."""
        counts = [part[rank].numel() for part in self._parts]
        return list(row[: self._nbytes[rank]].view(self._dtype).split_with_sizes(counts))


def _rows(grad: Tensor) -> Tensor:
    """The gradient with at least one dimension."""
    return grad.detach() if grad.dim() else grad.detach().view(1)


def node_groups(ranks: Sequence[int], rank: int, ranks_per_node: int) -> tuple[list[int], list[int]]:
    """(ranks of this rank's node, ranks of its inter-node group), of ``ranks``; nodes are runs of neighbours."""
    place = ranks.index(rank)
    node, local = divmod(place, ranks_per_node)
    first = node * ranks_per_node
    return list(ranks[first : first + ranks_per_node]), list(ranks[local::ranks_per_node])
