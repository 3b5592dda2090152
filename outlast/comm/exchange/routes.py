"""The two routes of a bucket: gathered whole, or in two phases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from outlast.comm.buffers import Buffer
from outlast.comm.compressors import Slots
from outlast.comm.exchange.item import Item
from outlast.comm.feedback import Feedback, Probe
from outlast.comm.slices import slices
from outlast.comm.transport.communicator import Communicator


class GatheredRoute:
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
            if item.absent:
                out.zero_()  # the same bytes in every run; nobody opens them
                continue
            g = item.to_compress()
            if item.state.local is None:
                item.state.start(self._feedback, g)
            assert item.state.local is not None
            self._feedback.encode(item.state.local, g, out, self._probe)

    def decode(self) -> None:
        assert self.gathered is not None
        rows = [row[: self.nbytes].split_with_sizes(self._sizes) for row in self.gathered]
        for index, item in enumerate(self._items):
            if item.absent:
                continue
            out = item.target()
            replicated = item.state.aggregate(self._feedback)
            self._feedback.decode(replicated, [row[index] for row in rows], out, item.state.name)
            item.write(out)


class TwoPhaseRoute:
    """Every rank's payload of slice j to rank j, which sums them; then the sum, compressed again, to every rank."""

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
            if item.absent:
                for owner in range(self._n):
                    outs[owner * len(self._items) + index].zero_()
                continue
            g = item.to_compress()
            if item.state.local is None:
                item.state.start(self._feedback, g)
            for owner, part in enumerate(slices(g, self._n)):
                local = item.state.unit(self._feedback, owner)
                self._feedback.encode(local, part, outs[owner * len(self._items) + index], self._probe)

    def to_owners(self, communicator: Communicator, label: str) -> None:
        assert self._sent is not None
        own = sum(self._first[self._rank])
        out = self._buffer("receive slice", self._n * own).view(self._n, own)
        self._received = communicator.all_to_all(self._sent, [sum(sizes) for sizes in self._first], label, out)

    def relay(self) -> None:
        """As owner of a slice of each tensor: sum, and compress again."""
        assert self._received is not None
        largest = max(sum(sizes) for sizes in self._second)
        self._own = self._buffer("relay", largest)
        rows = [row.split_with_sizes(self._first[self._rank]) for row in self._received]
        outs = self._own[: sum(self._second[self._rank])].split_with_sizes(self._second[self._rank])
        for index, item in enumerate(self._items):
            if item.absent:
                outs[index].zero_()
                continue
            state = item.state
            replicated = _cut(state.aggregate(self._feedback), self._rank, self._n)
            like = slices(item.target(), self._n)[self._rank]
            payloads = [row[index] for row in rows]
            self._feedback.relay(state.owner_slots(self._feedback), replicated, payloads, like, outs[index])

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
            if item.absent:
                continue
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
