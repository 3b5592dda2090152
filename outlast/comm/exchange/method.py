"""The method that a reducer uses at present, and the work it makes of a bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outlast.comm.buffers import BufferPool
from outlast.comm.config import CommConfig, two_phase
from outlast.comm.direction import Direction
from outlast.comm.exchange.exchange import Exchange
from outlast.comm.exchange.hierarchical import HierarchicalExchange
from outlast.comm.exchange.item import Item, Stage
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
    ) -> list[Stage]:
        """The work on one bucket, in order; the last stage is the codec's.

        Args:
            label: what it is, the same on every rank.
            states: of its parameters.
            grads: their gradients, overwritten with the estimates.
            step: the step they belong to.
            scale: the loss scale in them; 1 where there is none.
            probe: measures what is compressed; None measures nothing.
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
        if node is None:
            pairs = zip(states, grads, strict=True)
            return exchange([Item(state, grad, self.direction, scale) for state, grad in pairs]).stages()
        return HierarchicalExchange(label, states, grads, self.direction, scale, node, exchange, buffer).stages()
