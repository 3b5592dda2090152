"""Gradients of which each rank needs only its shard: compressed on their way to the shard's owner, and summed there.

It is the first phase of the two-phase transport without the second: a slice's owner keeps the sum, because its
optimizer steps the slice. So nothing is compressed twice, and each rank keeps a method's replicated slots (h of EF21)
for its own slice only. ::

    to owners   encode slice j for rank j, for all j | all-to-all | decode one's own slice
    to all      encode                               | all-gather | decode (the same on every rank)

The second way is for copies of a shard (the replicate dimension of HSDP), and is the all-gather transport.

Every message begins with the number of the first tensor in it that holds NaN or Inf, so that all ranks learn of it in
the same exchange and raise alike. Sums are taken in rank order, entry by entry, in float32 or float64.
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
from outlast.comm.state.shards import ShardedParam
from outlast.comm.transport.communicator import Communicator, mean_in_rank_order
from outlast.errors import NonFiniteGradient

GATHER_BELOW_BYTES = 131_072
"""Copies of a shard exchange whole tensors of up to this size together with the compressed ones."""
_HEADER_BYTES = 8


class ShardItem(NamedTuple):
    """One gradient to exchange.

    Attributes:
        param: its parameter.
        parts: this rank's gradient, a flat contiguous tensor for each cut; only read.
        out: flat, contiguous: where the estimate of this rank's slice is written; may be its part.
        scale: factor of the mean over ranks before it is written.
    """

    param: ShardedParam
    parts: Sequence[Tensor]
    out: Tensor
    scale: float = 1.0


class ShardExchange:
    """The exchange of some tensors over the ranks of a communicator.

    Args:
        label: what it is, the same on every rank.
        items: what to exchange; the same parameters on every rank, in the same order.
        communicator: the ranks to average over.
        feedback: None when nothing is ever compressed.
        direction: applied to a gradient before it is compressed; to tensors that never are, after the mean. It is
            applied to each slice separately: this changes nothing for what treats each entry separately, but Adam's
            clip_rms sees a slice, not the whole tensor.
        whole: whether this step sends whole tensors.
        buffer: provides the buffers.
        probe: measures what is compressed.
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
            feedback is None or not item.param.compress or whole or (feedback.dense_start and item.param.local is None)
            for item in items
        ]
        self._owners = max((len(item.param.cuts) for item in items), default=1)
        self._own = items[0].param.own if items else 0
        self._apart: list[int] = []
        """Items (of a gather) that are averaged separately, because they are whole and large."""
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
        """Gradients to messages; moves the local slots. Runs in the codec's thread."""
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
        """Exchange the messages. Runs in the communicator's thread."""
        communicator = self._communicator
        totals = [_HEADER_BYTES + sum(sizes) for sizes in self._sizes]
        n, own = communicator.world_size, totals[self._own]
        out = self._buffer("receive", n * own).view(n, own)
        if self._owners == 1:
            self._received = communicator.all_gather(self._sent, self._label, out)
        else:
            self._received = communicator.all_to_all(self._sent, totals, self._label, out)
        for index in self._apart:
            self._means[index] = communicator.mean(self._means[index], self._label)

    def decode(self) -> None:
        """The messages of all ranks to the estimate of this rank's slices. Runs in the codec's thread.

        Raises:
            NonFiniteGradient: some rank's message holds NaN or Inf; raised on every rank alike.
        """
        for rank, fault in enumerate(self._received[:, :_HEADER_BYTES].contiguous().view(torch.int64).view(-1)):
            if fault:
                raise NonFiniteGradient(
                    f"gradient of {self._items[int(fault) - 1].param.name} on rank {rank} holds NaN or Inf, or "
                    "overflowed the error feedback",
                    "look at that rank's loss and data of this step; lower the learning rate or clip gradients",
                )
        rows = [row[_HEADER_BYTES:].split_with_sizes(self._sizes[self._own]) for row in self._received]
        for index, item in enumerate(self._items):
            self._decode_item(index, item, [row[index] for row in rows])

    def _encode_item(self, index: int, item: ShardItem, outs: list[Tensor]) -> bool:
        """Write one tensor's messages, and return whether they are finite."""
        param, feedback = item.param, self._feedback
        parts = [flat(part).view(cut.shape) for part, cut in zip(item.parts, param.cuts, strict=True)]
        tracked = feedback is not None and param.compress
        first = tracked and param.local is None
        if first:
            assert feedback is not None
            if self._direction is not None:
                parts = [
                    param.direction_of(self._direction, owner, part).clone() if part.numel() else part
                    for owner, part in enumerate(parts)
                ]
            param.start(feedback, parts)
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
                g = param.direction_of(self._direction, owner, part)
            if not self._whole[index]:
                feedback.encode(param.unit(feedback, owner), g, out, self._probe)
                sound = sound and feedback.compressor.open(out, tuple(g.shape), g.dtype).finite()
                continue
            if not (first and feedback.dense_start):
                g = feedback.encode_dense(param.unit(feedback, owner), g)
            sound = sound and finite(g)
            self._put(index, g, out)
        return sound

    def _put(self, index: int, message: Tensor, out: Tensor) -> None:
        """Put a whole tensor into its message."""
        if index in self._apart:
            self._means[index] = message.reshape(-1).clone()
        else:
            out[: message.numel() * message.dtype.itemsize].view(message.dtype).copy_(message.reshape(-1))

    def _decode_item(self, index: int, item: ShardItem, payloads: list[Tensor]) -> None:
        param, feedback = item.param, self._feedback
        numel = item.out.numel()
        if numel == 0:
            return
        direct = item.out.dtype == param.dtype
        estimate = item.out if direct else torch.empty(numel, dtype=param.dtype, device=item.out.device)
        estimate = estimate.view(param.own_shape)
        if not self._whole[index]:
            assert feedback is not None
            feedback.decode(param.owner_slots(feedback), payloads, estimate, param.name)
        else:
            mean = self._means.pop(index, None)
            if mean is None:
                nbytes = numel * param.dtype.itemsize
                mean = mean_in_rank_order(torch.stack([row[:nbytes] for row in payloads]).view(param.dtype))
            mean = mean.view(estimate.shape)
            if feedback is not None and param.compress:
                feedback.decode_dense(param.owner_slots(feedback), mean, estimate, param.name)
            elif self._direction is not None:
                estimate.copy_(param.direction_of(self._direction, param.own, mean))
            else:
                estimate.copy_(mean)
        if not direct:
            item.out.copy_(estimate.view(-1))
        if item.scale != 1.0:
            item.out.mul_(item.scale)

    def _nbytes(self, index: int, owner: int) -> int:
        param = self._items[index].param
        if self._whole[index]:
            return self._whole_nbytes(index, owner)
        shape = param.cuts[owner].shape
        assert self._feedback is not None
        return self._feedback.compressor.nbytes(shape, param.dtype) if numel_of(shape) else 0

    def _whole_nbytes(self, index: int, owner: int) -> int:
        param = self._items[index].param
        return aligned(numel_of(param.cuts[owner].shape) * param.dtype.itemsize)
