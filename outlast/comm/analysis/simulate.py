"""n ranks in one process: what the transports do, bit for bit, without a network.

For tests, and to see what a method does to gradients before it runs on a cluster. All state is public, in the form in
which a checkpoint holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from outlast.comm.compressors import Shape, Slots
from outlast.comm.feedback import EF21PP, Feedback, Probe
from outlast.comm.feedback.layout import join, unit
from outlast.comm.slices import slices
from outlast.config import require
from outlast.errors import CommError

Transport = Literal["all-gather", "two-phase"]


class Simulation:
    """One tensor's gradients on n ranks, step by step.

    Sums are taken in rank order. In the two-phase transport the tensor is cut into n slices of rows (a tensor with one
    dimension, of entries), slice j from ``rows * j // n`` to ``rows * (j + 1) // n``; each is compressed separately,
    and rank j owns slice j.

    Args:
        feedback: the method, with its compressor.
        n: ranks.
        shape: of the tensor.
        dtype: float32 or float64.
        transport: ``all-gather`` or ``two-phase``.
        dense_start: whether the first step is whole; None asks the method. False starts trackers from zero.

    Attributes:
        local: each rank's slots, rank 0 first, laid out as in :mod:`outlast.comm.feedback.layout`; empty dicts before
            the first step.
        replicated: the slots that are the same on every rank.
        owned: the slots of each slice's owner; empty in the all-gather transport.

    Raises:
        OutOfRange: n below 1, or no such transport.
    """

    def __init__(
        self,
        feedback: Feedback,
        n: int,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        *,
        transport: Transport = "all-gather",
        dense_start: bool | None = None,
    ) -> None:
        require(n >= 1, "n", n, "n >= 1")
        require(transport in ("all-gather", "two-phase"), "transport", transport, "all-gather, two-phase")
        self.feedback = feedback
        self.ranks = [feedback.of_rank(rank) for rank in range(n)]
        """The method as each rank runs it."""
        self.n = n
        self.shape = tuple(shape) or (1,)
        self.dtype = dtype
        self.units = n if transport == "two-phase" else 1
        self._outer_shape = tuple(shape)
        self._dense_start = feedback.dense_start if dense_start is None else dense_start
        like = torch.zeros(self.shape, dtype=dtype)
        self.local: list[Slots] = [{} for _ in range(n)]
        self.replicated = feedback.new_replicated(like)
        self.owned = [feedback.new_owned(part) for part in slices(like, n)] if transport == "two-phase" else []
        self.started = False
        """Whether there is state to continue from; set it after loading some."""

    def step(
        self,
        gradients: Sequence[Tensor],
        *,
        whole: bool = False,
        participate: Sequence[bool] | None = None,
        probe: Probe | None = None,
    ) -> Tensor:
        """One step of all ranks.

        Args:
            gradients: one for each rank, of the tensor's shape and type; only read.
            whole: send whole tensors, as in a warm-up.
            participate: which ranks take part; only :class:`~outlast.comm.feedback.EF21PP` can do without some.
            probe: records the encoding of every rank and slice.

        Returns:
            The estimate of the mean gradient that every rank gets, in a new tensor.

        Raises:
            NonFiniteGradient: a gradient holds NaN or Inf; the slots are then undefined.
            CommError: not n gradients, or ranks absent that the method cannot do without.
        """
        if len(gradients) != self.n:
            raise CommError(f"{len(gradients)} gradients for {self.n} ranks", "give one for each rank")
        gs = [g.detach().reshape(self.shape) for g in gradients]
        present = [True] * self.n if participate is None else list(participate)
        if not all(present) and not isinstance(self.feedback, EF21PP):
            raise CommError(f"{self.feedback.name} needs every rank in every step", "use ef21-pp")
        started = self.started
        if not started:
            zero = not self._dense_start and self.feedback.dense_start
            for rank, g in enumerate(gs):
                self._start(rank, torch.zeros_like(g) if zero or not present[rank] else g)
            self.started = True
        if whole or (self._dense_start and not started):
            estimate = self._whole(gs, present, started)
        elif self.units == 1:
            estimate = self._all_gather(gs, present, probe)
        else:
            estimate = self._two_phase(gs, present, probe)
        return estimate.view(self._outer_shape)

    def _start(self, rank: int, g: Tensor) -> None:
        self.local[rank] = join(self.feedback, [self.ranks[rank].start(part) for part in slices(g, self.units)])

    def _unit(self, rank: int, index: int) -> Slots:
        return unit(self.feedback, self.local[rank], index, self.units)

    def _encode(self, rank: int, local: Slots, g: Tensor, present: bool, probe: Probe | None) -> Tensor:
        method = self.ranks[rank]
        if isinstance(method, EF21PP):
            return method.encode(local, g, probe=probe, participate=present)
        return method.encode(local, g, probe=probe)

    def _all_gather(self, gs: list[Tensor], present: list[bool], probe: Probe | None) -> Tensor:
        payloads = [self._encode(rank, self.local[rank], g, present[rank], probe) for rank, g in enumerate(gs)]
        return self.feedback.decode(self.replicated, payloads, torch.empty_like(gs[0]))

    def _two_phase(self, gs: list[Tensor], present: list[bool], probe: Probe | None) -> Tensor:
        out = torch.empty_like(gs[0])
        for index, part in enumerate(slices(out, self.n)):
            payloads = [
                self._encode(rank, self._unit(rank, index), slices(g, self.n)[index], present[rank], probe)
                for rank, g in enumerate(gs)
            ]
            replicated = {slot: slices(tensor, self.n)[index] for slot, tensor in self.replicated.items()}
            payload = self.feedback.relay(self.owned[index], replicated, payloads, part)
            self.feedback.receive(replicated, payload, part)
        return out

    def _whole(self, gs: list[Tensor], present: list[bool], started: bool) -> Tensor:
        messages = []
        for rank, g in enumerate(gs):
            method = self.ranks[rank]
            if not started:  # start() has given g to the method already
                messages.append(g if present[rank] else torch.zeros_like(g))
                continue
            parts = []
            for index, part in enumerate(slices(g, self.units)):
                local = self._unit(rank, index)
                if isinstance(method, EF21PP):
                    parts.append(method.encode_dense(local, part, participate=present[rank]))
                else:
                    parts.append(method.encode_dense(local, part))
            messages.append(torch.cat(parts))
        mean = rank_order_mean(messages)
        for owned, part in zip(self.owned, slices(mean, self.n), strict=False):
            self.feedback.settle(owned, part)
        return self.feedback.decode_dense(self.replicated, mean)


def rank_order_mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean, summed one after the other, in a new tensor."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total.div_(len(tensors))
