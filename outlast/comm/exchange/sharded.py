"""Gradients of which each rank wants one shard alone: compressed on their way to the shard's owner, and summed there.

It is the first phase of the two-phase transport without the second: what a slice's owner has summed stays with it,
for it is the owner whose optimizer steps the slice. So nothing is compressed twice, and of a method's replicated slots
(h of EF21) each rank keeps those of its own slice. ::

    to owners   encode slice j for rank j, for all j | all-to-all | decode one's own slice
    to all      encode                               | all-gather | decode (the same on every rank)

The second way is for copies of a shard (the replicate dimension of HSDP), and is the all-gather transport.

Every message begins with the number of the first tensor in it that holds NaN or Inf, so that all ranks know of it
in the same exchange, and raise alike. Sums are taken in rank order, entry by entry, in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from outlast.comm.buffers import Buffer
from outlast.comm.compressors.base import aligned, finite, flat, numel_of
from outlast.comm.direction import Direction
from outlast.comm.feedback import Feedback
from outlast.comm.feedback.probe import Probe
from outlast.comm.state.shards import Shards
from outlast.comm.transport.communicator import Communicator, mean_in_rank_order
from outlast.errors import NonFiniteGradient

GATHER_BELOW_BYTES = 131_072
"""Copies of a shard exchange whole tensors of up to this size together with the compressed ones."""
_HEADER_BYTES = 8


class ShardItem(NamedTuple):
    """One gradient to exchange.

    Attributes:
        shards: its parameter's.
        parts: this rank's gradient, a flat contiguous tensor for each cut; read only.
        out: flat, contiguous: where the estimate of this rank's slice is written; may be its part.
        scale: what the mean over ranks is multiplied with before it is written.
    """

    shards: Shards
    parts: Sequence[Tensor]
    out: Tensor
    scale: float = 1.0


class ShardExchange:
    """The exchange of some tensors over the ranks of a communicator.

    Args:
        label: what it is, the same on every rank.
        items: what to exchange; the same parameters on every rank, in the same order.
        communicator: over whom.
        feedback: None when nothing is ever compressed.
        direction: what is made of a gradient before it is compressed; of tensors that never are, after the mean. Each
            slice goes by itself: one that treats each entry by itself goes as the whole would, Adam's clip_rms looks
            at a slice.
        whole: whether this step sends whole tensors.
        buffer: where buffers come from.
        probe: what is compressed is measured with it.
    """

    def __init__(
        self,
        label: str,
        items: Sequence[ShardItem],
        communicator: Communicator,
        feedback: Feedback | None,
        direction: Direction | None,
        whole: bool,
        buffer: Buffer,
        probe: Probe | None = None,
    ) -> None:
        self._label = label
        self._items = items
        self._communicator = communicator
        self._feedback = feedback
        self._direction = direction
        self._buffer = buffer
        self._probe = probe
        self._whole = [
            feedback is None
            or not item.shards.compress
            or whole
            or (feedback.dense_start and item.shards.local is None)
            for item in items
        ]
        self._owners = max((len(item.shards.cuts) for item in items), default=1)
        self._mine = items[0].shards.mine if items else 0
        self._apart: list[int] = []
        """Items (of a gather) that are averaged by themselves, being whole and large."""
        if self._owners == 1 and communicator.world_size > 2:
            whole_items = [index for index, is_whole in enumerate(self._whole) if is_whole]
            if sum(self._whole_nbytes(index, 0) for index in whole_items) > GATHER_BELOW_BYTES:
                self._apart = whole_items
        self._sizes = [
            [0 if index in self._apart else self._nbytes(index, owner) for index in range(len(items))]
            for owner in range(self._owners)
        ]
        self._sent = self._received = torch.empty(0)
        self._means: dict[int, Tensor] = {}

    def encode(self) -> None:
        """For the codec's thread: gradients to messages; moves the local slots."""
        totals = [_HEADER_BYTES + sum(sizes) for sizes in self._sizes]
        self._sent = self._buffer("send", sum(totals))
        pieces = self._sent.split_with_sizes(totals)
        outs = [piece[_HEADER_BYTES:].split_with_sizes(sizes) for piece, sizes in zip(pieces, self._sizes, strict=True)]
        fault = 0
        for index, item in enumerate(self._items):
            rows = [out[index] for out in outs]
            sound = self._encode_item(index, item, rows)
            if not sound and not fault:
                fault = index + 1
        for piece in pieces:
            piece[:_HEADER_BYTES].view(torch.int64).fill_(fault)

    def move(self) -> None:
        """For the communicator's thread."""
        communicator = self._communicator
        totals = [_HEADER_BYTES + sum(sizes) for sizes in self._sizes]
        n, mine = communicator.world_size, totals[self._mine]
        out = self._buffer("receive", n * mine).view(n, mine)
        if self._owners == 1:
            self._received = communicator.all_gather(self._sent, self._label, out)
        else:
            self._received = communicator.all_to_all(self._sent, totals, self._label, out)
        for index in self._apart:
            self._means[index] = communicator.mean(self._means[index], self._label)

    def decode(self) -> None:
        """For the codec's thread: the messages of all ranks to the estimate of this rank's slices.

        Raises:
            NonFiniteGradient: some rank's message holds NaN or Inf; raised on every rank alike.
        """
        for rank, fault in enumerate(self._received[:, :_HEADER_BYTES].contiguous().view(torch.int64).view(-1)):
            if fault:
                raise NonFiniteGradient(
                    f"gradient of {self._items[int(fault) - 1].shards.name} on rank {rank} holds NaN or Inf, or "
                    "overflowed the error feedback",
                    "look at that rank's loss and data of this step; lower the learning rate or clip gradients",
                )
        rows = [row[_HEADER_BYTES:].split_with_sizes(self._sizes[self._mine]) for row in self._received]
        for index, item in enumerate(self._items):
            self._decode_item(index, item, [row[index] for row in rows])

    def _encode_item(self, index: int, item: ShardItem, outs: list[Tensor]) -> bool:
        """Write one tensor's messages; whether they are finite."""
        shards, feedback = item.shards, self._feedback
        parts = [flat(part).view(cut.shape) for part, cut in zip(item.parts, shards.cuts, strict=True)]
        tracked = feedback is not None and shards.compress
        first = tracked and shards.local is None
        if first:
            assert feedback is not None
            if self._direction is not None:
                parts = [
                    shards.direct(self._direction, owner, part).clone() if part.numel() else part
                    for owner, part in enumerate(parts)
                ]
            shards.start(feedback, parts)
        sound = True
        for owner, (part, out) in enumerate(zip(parts, outs, strict=True)):
            if part.numel() == 0:
                continue
            if not tracked:
                self._put(index, part, out)
                continue
            assert feedback is not None
            g = part
            if self._direction is not None and not first:
                g = shards.direct(self._direction, owner, part)
            if not self._whole[index]:
                feedback.encode(shards.unit(feedback, owner), g, out, self._probe)
                sound = sound and feedback.compressor.open(out, tuple(g.shape), g.dtype).finite()
                continue
            if not (first and feedback.dense_start):
                g = feedback.encode_dense(shards.unit(feedback, owner), g)
            sound = sound and finite(g)
            self._put(index, g, out)
        return sound

    def _put(self, index: int, message: Tensor, out: Tensor) -> None:
        """A whole tensor on its way."""
        if index in self._apart:
            self._means[index] = message.reshape(-1).clone()
        else:
            out[: message.numel() * message.dtype.itemsize].view(message.dtype).copy_(message.reshape(-1))

    def _decode_item(self, index: int, item: ShardItem, payloads: list[Tensor]) -> None:
        shards, feedback = item.shards, self._feedback
        numel = item.out.numel()
        if numel == 0:
            return
        direct = item.out.dtype == shards.dtype
        estimate = item.out if direct else torch.empty(numel, dtype=shards.dtype, device=item.out.device)
        estimate = estimate.view(shards.cuts[shards.mine].shape)
        if not self._whole[index]:
            assert feedback is not None
            feedback.decode(shards.held(feedback), payloads, estimate, shards.name)
        else:
            mean = self._means.pop(index, None)
            if mean is None:
                nbytes = numel * shards.dtype.itemsize
                mean = mean_in_rank_order(torch.stack([row[:nbytes] for row in payloads]).view(shards.dtype))
            mean = mean.view(estimate.shape)
            if feedback is not None and shards.compress:
                feedback.decode_dense(shards.held(feedback), mean, estimate, shards.name)
            elif self._direction is not None:
                estimate.copy_(shards.direct(self._direction, shards.mine, mean))
            else:
                estimate.copy_(mean)
        if not direct:
            item.out.copy_(estimate.view(-1))
        if item.scale != 1.0:
            item.out.mul_(item.scale)

    def _nbytes(self, index: int, owner: int) -> int:
        shards = self._items[index].shards
        if self._whole[index]:
            return self._whole_nbytes(index, owner)
        shape = shards.cuts[owner].shape
        assert self._feedback is not None
        return self._feedback.compressor.nbytes(shape, shards.dtype) if numel_of(shape) else 0

    def _whole_nbytes(self, index: int, owner: int) -> int:
        shards = self._items[index].shards
        return aligned(numel_of(shards.cuts[owner].shape) * shards.dtype.itemsize)
