"""The method that a reducer uses at present, and what it makes of a bucket."""

from __future__ import annotations

import torch
from torch import Tensor

from outlast.comm.config import CommConfig, two_phase
from outlast.comm.direction import Direction
from outlast.comm.exchange.bucket import BucketExchange
from outlast.comm.exchange.exchange import Exchange
from outlast.comm.exchange.hierarchical import NodeExchange
from outlast.comm.exchange.item import Item, Stage
from outlast.comm.exchange.topology import Network
from outlast.comm.feedback import Feedback, Probe
from outlast.comm.feedback.from_config import make_feedback


class ExchangeMethod:
    """Settings, feedback and transport, and the buffers they use.

    Args:
        config: which method; not ``auto``.
        network: over whom.
        direction: what is made of gradients first; None to average gradients.
        dense_direction: the same where nothing is compressed.
        feedback: in place of what ``config`` names.
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
        """Another method from the next exchange on."""
        rail = self._network.rail
        self.config = config
        self.of_all = feedback or make_feedback(config)
        """The method before it is that of one rank; None where nothing is compressed."""
        self.feedback = None if self.of_all is None else self.of_all.of_rank(rail.rank)
        """The method as this rank runs it."""
        compressed, dense = self._directions
        self.direction = dense if self.feedback is None else compressed
        self.two_phase = two_phase(config, rail.world_size)
        self.units = rail.world_size if self.two_phase else 1
        """In how many slices tensors are compressed."""
        self._buffers: dict[str, Tensor] = {}

    def stages(self, running: BucketExchange, step: int, scale: float, probe: Probe | None) -> list[Stage]:
        """Everything that is to be done with one bucket, in order; the last stage is the codec's."""

        def buffer(name: str, nbytes: int) -> Tensor:
            return self._buffer(f"{running.label}/{name}", nbytes, step)

        def exchange(items: list[Item]) -> Exchange:
            return Exchange(
                running.label,
                items,
                self._network.rail,
                feedback=self.feedback,
                whole=step <= self.config.warmup_steps,
                two_phase=self.two_phase,
                buffer=buffer,
                probe=probe,
            )

        node, states, grads = self._network.node, running.states, running.grads
        if node is None:
            pairs = zip(states, grads, strict=True)
            return exchange([Item(state, grad, self.direction, scale) for state, grad in pairs]).stages()
        return NodeExchange(running.label, states, grads, self.direction, scale, node, exchange, buffer).stages()

    def _buffer(self, use: str, nbytes: int, step: int) -> Tensor:
        """A uint8 tensor, kept for the next step except in a warm-up, whose buffers are as large as the model."""
        held = self._buffers.get(use)
        if held is None or held.numel() < nbytes:
            held = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            if self.feedback is None or step > max(self.config.warmup_steps, 1):
                self._buffers[use] = held
        return held[:nbytes]
