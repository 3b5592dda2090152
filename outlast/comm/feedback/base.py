"""Error feedback: state machines that make compressed gradients converge.

Notation: n ranks; g_i is rank i's gradient at the current point, C a contractive compressor with constant delta
(``Compressor.alpha``), x the parameters, gamma the step size. A :class:`Feedback` holds settings only. Its state is in
named tensors ("slots") in dicts owned by the caller: *local* ones, different on every rank; *replicated* ones,
bit-identical on every rank because every rank computes them from the same payloads in the same order; and, in the
two-phase transport, *owned* ones, which only the rank that sums a tensor's slice has.

A tensor is exchanged in one of three ways::

    all-gather   encode on every rank, all-gather of payloads, decode on every rank
    two-phase    encode on every rank; payloads to the owner, which compresses their mean again and relays it; receive
                 on every rank the owner's payload
    whole        encode_dense on every rank, a mean over ranks, decode_dense on every rank (settle on the owner)

In the two-phase transport a tensor is cut into one slice of rows per rank, and each slice is exchanged separately: what
is a tensor here is a slice there. The same calls with n local dicts in a list are a simulation of n ranks in one
process, bit for bit (see :mod:`outlast.comm.analysis.simulate`).

Where the papers write ``x -= gamma * estimate``, the optimizer uses the estimate as its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from outlast.comm.compressors import Compressor, Message, Shape, Slots
from outlast.comm.compressors.base import finite
from outlast.comm.feedback.probe import Probe
from outlast.errors import CommError, NonFiniteGradient


class Feedback(ABC):
    """What is sent, and how state moves.

    All tensors of a call are contiguous, of one shape, one dtype (float32 or float64) and one device. Gradients handed
    in are never changed and may be reused on return. After :class:`NonFiniteGradient` the slots are undefined: reload
    them from a checkpoint.

    Args:
        compressor: C, of what ranks send.
        second: the compressor of what owners relay in the two-phase transport; None takes C.
    """

    name: ClassVar[str]
    own_slots: tuple[str, ...] = ()
    """The method's local slots with the tensor's shape and type; there are also :attr:`apart_slots`."""
    residual_slots: ClassVar[tuple[str, ...]] = ()
    """The method's slots that hold what was not sent yet, and so add up over ranks; the others are trackers."""
    replicated_slots: ClassVar[tuple[str, ...]] = ()
    relay_slots: ClassVar[tuple[str, ...]] = ()
    """What the owner of a slice keeps in the two-phase transport, besides the second compressor's memory."""
    dense_start: ClassVar[bool] = False
    """Whether the first message is the whole gradient."""

    def __init__(self, compressor: Compressor, second: Compressor | None = None) -> None:
        self.compressor = compressor
        self.second = second or compressor

    def of_rank(self, rank: int) -> Self:
        """The method as ``rank`` runs it: itself, unless ranks differ."""
        return self

    @property
    def share(self) -> float:
        """The weight of this rank's trackers in the estimate, times the number of ranks; 1, unless weighted."""
        return 1.0

    @property
    def apart_slots(self) -> tuple[str, ...]:
        """Names of the local slots with other shapes and types, which each slice has for itself in the two-phase
        transport: the compressor's memory, and what the method packs."""
        return self.compressor.memory_slots

    def new_apart(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Slots:
        """The slots ``apart_slots`` of a tensor that was never compressed."""
        return self.compressor.new_memory(shape, dtype, device)

    def start(self, g: Tensor) -> Slots:
        """Local slots of a rank whose first gradient is ``g``; with ``dense_start`` its first message is ``g``."""
        return self._own(g) | self.new_apart(tuple(g.shape), g.dtype, g.device)

    @abstractmethod
    def _own(self, g: Tensor) -> Slots:
        """The slots ``own_slots`` at the start."""

    def new_replicated(self, like: Tensor) -> Slots:
        """Replicated slots, zero, shaped as ``like``."""
        return {slot: torch.zeros_like(like) for slot in self.replicated_slots}

    def new_owned(self, like: Tensor) -> Slots:
        """Owned slots of a slice shaped as ``like``, as they are before the first step."""
        own = {slot: torch.zeros_like(like) for slot in self.relay_slots}
        return own | self.second.new_memory(tuple(like.shape), like.dtype, like.device)

    def unpack(self, local: Slots, shape: Shape, dtype: torch.dtype) -> Slots:
        """The method's own slots of a tensor (or slice) as tensors of its shape and type, in order to reshard them. The
        compressor's memory is not among them. They may be the slots themselves."""
        return {slot: local[slot] for slot in self.own_slots}

    def pack(self, own: Slots) -> Slots:
        """The slots whose :meth:`unpack` is ``own``."""
        return own

    @abstractmethod
    def encode(self, local: Slots, g: Tensor, out: Tensor | None = None, probe: Probe | None = None) -> Tensor:
        """Move ``local`` by the gradient ``g`` and return the payload.

        Args:
            local: this rank's slots of the tensor, moved.
            g: its gradient.
            out: where the payload (nbytes,) uint8 is written; None allocates it.
            probe: records what was compressed and what was left; costs two to four more passes.
        """

    def decode(
        self, replicated: Slots, payloads: Sequence[Tensor | None], out: Tensor | None = None, name: str = "tensor"
    ) -> Tensor:
        """Move ``replicated`` by all ranks' payloads, in rank order, and return the estimate of the mean gradient.

        Args:
            replicated: this tensor's replicated slots.
            payloads: one from each rank, rank 0 first: the order of summation. None, for a rank that sent nothing, is
                for :class:`~outlast.comm.feedback.EF21PP` alone.
            out: where the estimate is written; None allocates it, and needs a replicated slot.
            name: the tensor's name, for errors.

        Raises:
            NonFiniteGradient: a payload holds NaN or Inf; raised on every rank alike, before ``replicated`` is touched.
            CommError: a payload is missing, or has the wrong size for the tensor.
        """
        if out is None:
            out = torch.empty_like(next(iter(replicated.values())))
        messages = self._open_all(payloads, out)
        for rank, message in enumerate(messages):
            if not message.finite():
                raise NonFiniteGradient(
                    f"gradient of {name} on rank {rank} holds NaN or Inf, or overflowed the error feedback",
                    "look at that rank's loss and data of this step; lower the learning rate or clip gradients",
                )
        self._aggregate(replicated, messages, out)
        return out

    def _open_all(self, payloads: Sequence[Tensor | None], like: Tensor) -> Sequence[Message]:
        present = [payload for payload in payloads if payload is not None]
        if len(present) < len(payloads):
            raise CommError(f"{self.name} needs a payload from every rank", "use ef21-pp if ranks may be absent")
        return self.compressor.open_all(present, tuple(like.shape), like.dtype)

    def _aggregate(self, replicated: Slots, messages: Sequence[Message], out: Tensor) -> None:
        """Without replicated state: the mean of what was sent."""
        self._add(messages, out.zero_())

    def _add(self, messages: Sequence[Message], out: Tensor) -> None:
        """``out +=`` the mean of the ranks' messages, or what weights make of it, in rank order."""
        for message in messages:
            message.add_to(out, 1 / len(messages))

    def relay(
        self, owned: Slots, replicated: Slots, payloads: Sequence[Tensor], like: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """As the owner of a slice: sum what the ranks sent of it, and compress the sum again, with feedback of its own.

        Args:
            owned: the slice's owned slots, moved.
            replicated: the slice of the replicated slots, read only; :meth:`receive` moves it.
            payloads: the slice's payload from each rank, rank 0 first.
            like: any tensor of the slice's shape, type and device.
            out: where the payload (nbytes,) uint8 is written; None allocates it.

        Returns:
            The payload for every rank to :meth:`receive`. It carries NaN and Inf along.
        """
        messages = self._open_all(payloads, like)
        return self._relay(owned, replicated, messages, like, out)

    @abstractmethod
    def _relay(
        self, owned: Slots, replicated: Slots, messages: Sequence[Message], like: Tensor, out: Tensor | None
    ) -> Tensor:
        """See :meth:`relay`."""

    def receive(self, replicated: Slots, payload: Tensor, out: Tensor, name: str = "tensor") -> Tensor:
        """Move the slice of ``replicated`` by the owner's payload, and write the estimate of the slice to ``out``.

        Raises:
            NonFiniteGradient: the payload holds NaN or Inf; raised on every rank alike.
        """
        message = self.second.open(payload, tuple(out.shape), out.dtype)
        if not message.finite():
            raise NonFiniteGradient(
                f"gradient of {name} holds NaN or Inf on some rank, or overflowed the error feedback",
                "look at the ranks' losses and data of this step; lower the learning rate or clip gradients",
            )
        self._receive(replicated, message, out)
        return out

    def _receive(self, replicated: Slots, message: Message, out: Tensor) -> None:
        message.add_to(out.zero_())

    @abstractmethod
    def encode_dense(self, local: Slots, g: Tensor) -> Tensor:
        """As :meth:`encode`, for a step that sends the whole tensor. Returns the message, maybe a slot or ``g``
        itself."""

    def decode_dense(self, replicated: Slots, mean: Tensor, out: Tensor | None = None, name: str = "tensor") -> Tensor:
        """As :meth:`decode`, given the mean over ranks of their whole messages.

        Raises:
            NonFiniteGradient: the mean holds NaN or Inf; raised on every rank alike.
        """
        if not finite(mean):
            raise NonFiniteGradient(
                f"mean over ranks of the gradient of {name} holds NaN or Inf",
                "look at the ranks' losses and data of this step; lower the learning rate or clip gradients",
            )
        for slot in self.replicated_slots:
            replicated[slot].copy_(mean)
        if out is None:
            return mean.clone()
        return out.copy_(mean)

    def settle(self, owned: Slots, mean: Tensor) -> None:
        """The owner of a slice, after a whole step: its owned slots follow the mean (of its slice)."""
        for slot in self.relay_slots:
            owned[slot].copy_(mean)


class Compensated(Feedback):
    """Methods whose state is what was not sent yet. In the two-phase transport the owner keeps such a slot too. ::

    s += mean of what was sent        C(s) sent        s -= C(s)
    """

    relay_slots: ClassVar[tuple[str, ...]] = ("s",)

    def _relay(
        self, owned: Slots, replicated: Slots, messages: Sequence[Message], like: Tensor, out: Tensor | None
    ) -> Tensor:
        s = owned["s"]
        self._add(messages, s)
        message = self.second.compress(s, out, owned)
        message.add_to(s, -1.0)
        return message.payload

    def settle(self, owned: Slots, mean: Tensor) -> None:
        """What the owner holds back is unchanged: a whole step says nothing about it."""
