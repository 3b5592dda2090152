"""The exchange of some gradients: compressed, moved, and written back as estimates of their mean.

An exchange is a list of stages, each to be run by the codec's or the communicator's thread, in turn::

    all-gather   encode | all-gather                              | decode
    two-phase    encode | all-to-all | relay (as owner) | all-gather | decode

Tensors that are not compressed in this step travel whole: in the same all-gather if they are small, else through
:meth:`Communicator.mean`. Both ways sum in rank order, so the choice does not show in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outlast.comm.buffers import Buffer
from outlast.comm.compressors.base import aligned
from outlast.comm.exchange.item import Item, Stage
from outlast.comm.exchange.routes import GatheredRoute, TwoPhaseRoute
from outlast.comm.feedback import Feedback, Probe
from outlast.comm.slices import slices
from outlast.comm.transport.communicator import Communicator, mean_in_rank_order

GATHER_BELOW_BYTES = 131_072
"""Whole tensors of an exchange ride in the all-gather up to this total size: it moves n / 2 times the bytes of a mean,
but saves two round trips."""


@dataclass(slots=True)
class _Whole:
    """Tensors that are sent as they are, end to end in one flat tensor."""

    items: list[Item] = field(default_factory=list)
    flat: Tensor | None = None
    mean: Tensor | None = None

    @property
    def numel(self) -> int:
        return sum(item.grad.numel() for item in self.items)


class Exchange:
    """The exchange of some tensors over all ranks of a communicator.

    Args:
        label: what it is, the same on every rank.
        items: what to average, the same on every rank.
        communicator: the ranks to average over.
        feedback: None when nothing is ever compressed.
        whole: whether this step sends whole tensors.
        two_phase: the transport of what is compressed.
        buffer: provides the buffers.
        probe: measures what is compressed.
    """

    def __init__(
        self,
        label: str,
        items: Sequence[Item],
        communicator: Communicator,
        *,
        feedback: Feedback | None,
        whole: bool,
        two_phase: bool,
        buffer: Buffer,
        probe: Probe | None = None,
    ) -> None:
        self._label = label
        self._communicator = communicator
        self._feedback = feedback
        self._buffer = buffer
        self._compressed: list[Item] = []
        self._whole = _Whole()
        for item in items:
            state = item.state
            first_whole = feedback is not None and feedback.dense_start and state.local is None
            if feedback is None or not state.compress or whole or first_whole:
                self._whole.items.append(item)
            else:
                self._compressed.append(item)
        self._route: GatheredRoute | TwoPhaseRoute | None = None
        if self._compressed:
            assert feedback is not None
            route = TwoPhaseRoute if two_phase else GatheredRoute
            self._route = route(self._compressed, feedback, communicator.rank, communicator.world_size, buffer, probe)
        self._bundle: Tensor | None = None
        self._bundled_at = 0

    def stages(self) -> list[Stage]:
        """The work, in order."""
        result = [Stage("codec", self._encode), Stage("wire", self._send)]
        if isinstance(self._route, TwoPhaseRoute):
            result += [Stage("codec", self._route.relay), Stage("wire", self._spread)]
        return [*result, Stage("codec", self._decode)]

    def _encode(self) -> None:
        n = self._communicator.world_size
        numel = self._whole.numel
        dtype = self._whole.items[0].state.dtype if numel else torch.float32
        nbytes = numel * dtype.itemsize
        # Whole tensors ride along where there is an all-gather anyway, or where one is the cheapest way.
        bundled = numel > 0 and (n <= 2 or nbytes <= GATHER_BELOW_BYTES)
        route = self._route
        if isinstance(route, GatheredRoute):
            at = route.nbytes
            self._bundled_at = at
            self._bundle = self._buffer("send", at + (aligned(nbytes) if bundled else 0))
            route.payload = self._bundle[:at]
        elif bundled:
            self._bundle = self._buffer("bundle", aligned(nbytes))
        if numel:
            if bundled:
                assert self._bundle is not None
                self._whole.flat = self._bundle[self._bundled_at : self._bundled_at + nbytes].view(dtype)
            else:
                self._whole.flat = self._buffer("whole", nbytes).view(dtype)
            at = 0
            for item in self._whole.items:
                place = self._whole.flat[at : at + item.grad.numel()]
                if item.absent:
                    place.zero_()
                else:
                    place.copy_(self._whole_message(item).view(-1))
                at += item.grad.numel()
        if route is not None:
            route.encode()

    def _whole_message(self, item: Item) -> Tensor:
        state, feedback = item.state, self._feedback
        if feedback is None or not state.compress:
            return item.read()
        g = item.to_compress()
        if state.local is None:
            state.start(feedback, g)
            return g
        return feedback.encode_dense(state.local, g)

    def _send(self) -> None:
        n, communicator = self._communicator.world_size, self._communicator
        gathered = None
        if self._bundle is not None:
            total = self._bundle.numel()
            gathered = communicator.all_gather(
                self._bundle, self._label, self._buffer("receive", n * total).view(n, total)
            )
        if isinstance(self._route, GatheredRoute):
            assert gathered is not None
            self._route.gathered = gathered
        if isinstance(self._route, TwoPhaseRoute):
            self._route.to_owners(communicator, self._label)
        whole = self._whole
        if whole.flat is not None:
            if self._bundle is None or whole.flat.data_ptr() != self._bundle[self._bundled_at :].data_ptr():
                whole.mean = communicator.mean(whole.flat, self._label)
            else:
                assert gathered is not None
                nbytes = whole.flat.numel() * whole.flat.element_size()
                rows = gathered[:, self._bundled_at : self._bundled_at + nbytes].view(whole.flat.dtype)
                whole.mean = mean_in_rank_order(rows)

    def _spread(self) -> None:
        assert isinstance(self._route, TwoPhaseRoute)
        self._route.to_all(self._communicator, self._label)

    def _decode(self) -> None:
        """Raises NonFiniteGradient of the first tensor at fault, the same on every rank."""
        if self._route is not None:
            self._route.decode()
        mean, at, feedback = self._whole.mean, 0, self._feedback
        for item in self._whole.items:
            assert mean is not None
            state = item.state
            piece = mean[at : at + item.grad.numel()].view(state.shape)
            at += item.grad.numel()
            if item.absent:
                continue
            if feedback is not None and state.compress:
                out = item.target()
                feedback.decode_dense(state.aggregate(feedback), piece, out, state.name)
                if state.units > 1:
                    feedback.settle(state.owner_slots(feedback), slices(piece, state.units)[state.rank])
                item.write(out)
            else:
                item.write(piece if item.direction is None else state.direction_of(item.direction, piece))
