"""The method that a reducer uses at present, and the work it makes of a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from outlast.comm.buffers import BufferPool
from outlast.comm.compressors.base import aligned
from outlast.comm.config import CommConfig, two_phase
from outlast.comm.direction import Direction
from outlast.comm.exchange.exchange import Exchange
from outlast.comm.exchange.hierarchical import HierarchicalExchange
from outlast.comm.exchange.item import Item, Presence, Stage
from outlast.comm.exchange.topology import Network
from outlast.comm.feedback import Feedback, Probe
from outlast.comm.feedback.from_config import feedback_from_config
from outlast.comm.state.parameters import ParamState


class ExchangeMethod:
    """Settings, feedback and transport, and the buffers they use.

    Args:
        config: which method; not ``auto``.
        network: over whom.
        direction: applied to gradients first; None to average gradients.
        dense_direction: the same where nothing is compressed.
        feedback: replaces the one that ``config`` names.
        device: of the gradients.
    """

    def __init__(
        self,
        config: CommConfig,
        network: Network,
        direction: Direction | None,
        dense_direction: Direction | None,
        feedback: Feedback | None,
        device: torch.device,
    ) -> None:
        self._directions = direction, dense_direction
        self._network = network
        self._device = device
        self.use(config, feedback)

    def use(self, config: CommConfig, feedback: Feedback | None = None) -> None:
        """Use another method from the next exchange on."""
        among = self._network.inter_node
        self.config = config
        self.of_all = feedback or feedback_from_config(config)
        """The method, not bound to a rank; None where nothing is compressed."""
        self.feedback = None if self.of_all is None else self.of_all.of_rank(among.rank)
        """The method as this rank runs it."""
        compressed, dense = self._directions
        self.direction = dense if self.feedback is None else compressed
        self.two_phase = two_phase(config, among.world_size)
        self.units = among.world_size if self.two_phase else 1
        """In how many slices tensors are compressed."""
        self._buffers = BufferPool(self._device)

    def stages(
        self,
        label: str,
        states: Sequence[ParamState],
        grads: Sequence[Tensor],
        step: int,
        scale: float,
        probe: Probe | None,
        presence: Sequence[Presence] | None = None,
    ) -> list[Stage]:
        """The work on one bucket, in order; the last stage is the codec's.

        Args:
            label: what it is, the same on every rank.
            states: of its parameters.
            grads: their gradients, overwritten with the estimates.
            step: the step they belong to.
            scale: the loss scale in them; 1 where there is none.
            probe: measures what is compressed; None measures nothing.
            presence: which of them take part, on which the ranks agree first; None where all do.
        """
        keep = self.feedback is None or step > max(self.config.warmup_steps, 1)
        buffer = self._buffers.of(label, keep=keep)

        def exchange(items: list[Item]) -> Exchange:
            return Exchange(
                label,
                items,
                self._network.inter_node,
                feedback=self.feedback,
                whole=step <= self.config.warmup_steps,
                two_phase=self.two_phase,
                buffer=buffer,
                probe=probe,
            )

        node = self._network.intra_node
        present: Sequence[Presence | None] = [None] * len(states) if presence is None else presence
        if node is None:
            items = zip(states, grads, present, strict=True)
            work = exchange([Item(state, grad, self.direction, scale, here) for state, grad, here in items]).stages()
        else:
            work = HierarchicalExchange(
                label, states, grads, self.direction, scale, node, exchange, buffer, present
            ).stages()
        if presence is None:
            return work
        return [Stage("wire", partial(self._agree, label, presence)), *work]

    @property
    def keeps_state(self) -> bool:
        """Whether an average depends on those before, so that it matters what became of them."""
        return self.feedback is not None or self.direction is not None

    def _agree(self, label: str, presence: Sequence[Presence]) -> None:
        """Which of the tensors some rank used; in the communicator's thread."""
        among = self._network.all_ranks
        mine = torch.zeros(aligned(len(presence)), dtype=torch.uint8)
        mine[: len(presence)] = torch.tensor([one.here for one in presence], dtype=torch.uint8)
        used = among.all_gather(mine.to(self._device), f"{label} used").amax(0).tolist()
        for one, anywhere in zip(presence, used, strict=False):
            one.anywhere = bool(anywhere)
