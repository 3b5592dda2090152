"""Some gradients on their way: compressed, moved, and written back as estimates of their mean.

An exchange is a list of stages, each to be run by the codec's or the communicator's thread, in turn::

    all-gather   encode | all-gather                              | decode
    two-phase    encode | all-to-all | relay (as owner) | all-gather | decode

Tensors that are not compressed in this step travel whole: in the same all-gather where they are small, else through
:meth:`Communicator.mean`. Both ways sum in rank order, so which one is taken does not show in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from outlast.comm._cut import slices
from outlast.comm._store import ParamState
from outlast.comm.communicator import Communicator, mean_in_rank_order
from outlast.comm.compressors import Slots
from outlast.comm.compressors.base import aligned, flat
from outlast.comm.direction import Direction
from outlast.comm.feedback import Feedback, Probe

GATHER_BELOW_BYTES = 131_072
"""Whole tensors of an exchange go with the all-gather up to this size together: it moves n / 2 times the bytes of a
mean, but saves two round trips."""

Buffer = Callable[[str, int], Tensor]
"""(use, nbytes) to a uint8 tensor of that size, reused from step to step."""


class Stage(NamedTuple):
    """A piece of work and the thread it belongs to."""

    thread: Literal["codec", "wire"]
    work: Callable[[], None]


@dataclass(slots=True)
class Item:
    """One tensor to average over ranks, in place.

    Attributes:
        state: its parameter's.
        grad: of the state's shape; read when the exchange encodes, and overwritten with the estimate when it decodes.
            Nobody else may touch it in between.
        direction: what is made of the gradient before it is compressed; of tensors that never are, after the mean.
        scale: what ``grad`` was multiplied with before; the estimate is multiplied likewise, the state is not.
    """

    state: ParamState
    grad: Tensor
    direction: Direction | None = None
    scale: float = 1.0

    def read(self) -> Tensor:
        """The gradient, contiguous, unscaled, in the type it is summed in; a view where it can be."""
        g = flat(self.grad).view(self.state.shape)
        return g if self.scale == 1.0 else g / self.scale

    def wanted(self) -> Tensor:
        """What error feedback is fed: the gradient or its direction; valid until the next call in this thread."""
        g = self.read()
        return g if self.direction is None else self.state.direct(self.direction, g)

    def target(self) -> Tensor:
        """Where an estimate is written: the gradient itself where its memory is as it must be."""
        if self.grad.is_contiguous() and self.grad.dtype == self.state.dtype:
            return self.grad.detach().view(self.state.shape)
        return torch.empty(self.state.shape, dtype=self.state.dtype, device=self.grad.device)

    def write(self, estimate: Tensor) -> None:
        """The estimate into the gradient, unless it was written there; scaled."""
        if estimate.data_ptr() != self.grad.data_ptr():
            self.grad.copy_(estimate.view(self.grad.shape))
        if self.scale != 1.0:
            self.grad.mul_(self.scale)


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
        communicator: over whom.
        feedback: None when nothing is ever compressed.
        whole: whether this step sends whole tensors.
        two_phase: the transport of what is compressed.
        buffer: where buffers come from.
        probe: what is compressed is measured with it.
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
        self._route: _Gathered | _TwoPhase | None = None
        if self._compressed:
            assert feedback is not None
            route = _TwoPhase if two_phase else _Gathered
            self._route = route(self._compressed, feedback, communicator.rank, communicator.world_size, buffer, probe)
        self._bundle: Tensor | None = None
        self._bundled_at = 0

    def stages(self) -> list[Stage]:
        """What is to be done, in order."""
        result = [Stage("codec", self._encode), Stage("wire", self._send)]
        if isinstance(self._route, _TwoPhase):
            result += [Stage("codec", self._route.relay), Stage("wire", self._spread)]
        return [*result, Stage("codec", self._decode)]

    def _encode(self) -> None:
        n = self._communicator.world_size
        numel = self._whole.numel
        dtype = self._whole.items[0].state.dtype if numel else torch.float32
        nbytes = numel * dtype.itemsize
        # Whole tensors ride along where there is an all-gather for them, or where one is the cheapest way.
        bundled = numel > 0 and (n <= 2 or nbytes <= GATHER_BELOW_BYTES)
        route = self._route
        if isinstance(route, _Gathered):
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
                self._whole.flat[at : at + item.grad.numel()].copy_(self._whole_message(item).view(-1))
                at += item.grad.numel()
        if route is not None:
            route.encode()

    def _whole_message(self, item: Item) -> Tensor:
        state, feedback = item.state, self._feedback
        if feedback is None or not state.compress:
            return item.read()
        g = item.wanted()
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
        if isinstance(self._route, _Gathered):
            assert gathered is not None
            self._route.gathered = gathered
        if isinstance(self._route, _TwoPhase):
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
        assert isinstance(self._route, _TwoPhase)
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
            if feedback is not None and state.compress:
                out = item.target()
                feedback.decode_dense(state.aggregate(feedback), piece, out, state.name)
                if state.units > 1:
                    feedback.settle(state.held(feedback), slices(piece, state.units)[state.rank])
                item.write(out)
            else:
                item.write(piece if item.direction is None else state.direct(item.direction, piece))


class _Gathered:
    """Every rank's payload to every rank."""

    def __init__(
        self, items: Sequence[Item], feedback: Feedback, rank: int, n: int, buffer: Buffer, probe: Probe | None
    ) -> None:
        self._items = items
        self._probe = probe
        self._feedback = feedback
        self._sizes = [feedback.compressor.nbytes(item.state.shape, item.state.dtype) for item in items]
        self.nbytes = sum(self._sizes)
        self.payload: Tensor | None = None
        """(nbytes,) uint8, where to encode."""
        self.gathered: Tensor | None = None
        """(n, at least nbytes) uint8, of all ranks."""

    def encode(self) -> None:
        assert self.payload is not None
        for item, out in zip(self._items, self.payload.split_with_sizes(self._sizes), strict=True):
            g = item.wanted()
            if item.state.local is None:
                item.state.start(self._feedback, g)
            assert item.state.local is not None
            self._feedback.encode(item.state.local, g, out, self._probe)

    def decode(self) -> None:
        assert self.gathered is not None
        rows = [row[: self.nbytes].split_with_sizes(self._sizes) for row in self.gathered]
        for index, item in enumerate(self._items):
            out = item.target()
            replicated = item.state.aggregate(self._feedback)
            self._feedback.decode(replicated, [row[index] for row in rows], out, item.state.name)
            item.write(out)


class _TwoPhase:
    """Every rank's payload of slice j to rank j, which sums, and the sum, compressed anew, to every rank."""

    def __init__(
        self, items: Sequence[Item], feedback: Feedback, rank: int, n: int, buffer: Buffer, probe: Probe | None
    ) -> None:
        self._items = items
        self._probe = probe
        self._feedback = feedback
        self._rank = rank
        self._n = n
        self._buffer = buffer
        shapes = [[tuple(part.shape) for part in slices(item.grad.view(item.state.shape), n)] for item in items]
        types = [item.state.dtype for item in items]
        self._first = _sizes(feedback.compressor.nbytes, shapes, types, n)
        """Bytes of each item's slice on the way to its owner: [owner][item]."""
        self._second = _sizes(feedback.second.nbytes, shapes, types, n)
        """Bytes of each item's slice on the way from its owner: [owner][item]."""
        self._sent: Tensor | None = None
        self._received: Tensor | None = None
        self._own: Tensor | None = None
        self._spread: Tensor | None = None

    def encode(self) -> None:
        self._sent = self._buffer("send", sum(sum(sizes) for sizes in self._first))
        outs = self._sent.split_with_sizes([size for sizes in self._first for size in sizes])
        for index, item in enumerate(self._items):
            g = item.wanted()
            if item.state.local is None:
                item.state.start(self._feedback, g)
            for owner, part in enumerate(slices(g, self._n)):
                local = item.state.of_slice(self._feedback, owner)
                self._feedback.encode(local, part, outs[owner * len(self._items) + index], self._probe)

    def to_owners(self, communicator: Communicator, label: str) -> None:
        assert self._sent is not None
        mine = sum(self._first[self._rank])
        out = self._buffer("receive slice", self._n * mine).view(self._n, mine)
        self._received = communicator.all_to_all(self._sent, [sum(sizes) for sizes in self._first], label, out)

    def relay(self) -> None:
        """As owner of a slice of each tensor: sum, and compress anew."""
        assert self._received is not None
        largest = max(sum(sizes) for sizes in self._second)
        self._own = self._buffer("relay", largest)
        rows = [row.split_with_sizes(self._first[self._rank]) for row in self._received]
        outs = self._own[: sum(self._second[self._rank])].split_with_sizes(self._second[self._rank])
        for index, item in enumerate(self._items):
            state = item.state
            replicated = _cut(state.aggregate(self._feedback), self._rank, self._n)
            like = slices(item.target(), self._n)[self._rank]
            payloads = [row[index] for row in rows]
            self._feedback.relay(state.held(self._feedback), replicated, payloads, like, outs[index])

    def to_all(self, communicator: Communicator, label: str) -> None:
        assert self._own is not None
        largest = self._own.numel()
        out = self._buffer("receive all", self._n * largest).view(self._n, largest)
        self._spread = communicator.all_gather(self._own, label, out)

    def decode(self) -> None:
        assert self._spread is not None
        rows = [
            row[: sum(sizes)].split_with_sizes(sizes) for row, sizes in zip(self._spread, self._second, strict=True)
        ]
        for index, item in enumerate(self._items):
            out = item.target()
            replicated = item.state.aggregate(self._feedback)
            for owner, part in enumerate(slices(out, self._n)):
                cut = _cut(replicated, owner, self._n)
                self._feedback.receive(cut, rows[owner][index], part, item.state.name)
            item.write(out)


def _cut(replicated: Slots, part: int, parts: int) -> Slots:
    return {slot: slices(tensor, parts)[part] for slot, tensor in replicated.items()}


def _sizes(
    nbytes: Callable[[tuple[int, ...], torch.dtype], int],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    types: Sequence[torch.dtype],
    n: int,
) -> list[list[int]]:
    return [[nbytes(shape[owner], dtype) for shape, dtype in zip(shapes, types, strict=True)] for owner in range(n)]
