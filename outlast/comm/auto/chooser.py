"""Watches the dense first steps of ``compressor = "auto"``, then chooses."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from outlast.comm.auto.policy import (
    DENSE_STEPS,
    Choice,
    candidate,
    candidates,
    choose,
    measure_codec,
    measure_link,
    shapes_of,
    timing_of,
)
from outlast.comm.config import CommConfig
from outlast.comm.exchange.stats import ReduceMeter
from outlast.comm.exchange.topology import Network
from outlast.comm.state.parameters import ParamState


class Auto:
    """One reducer's choice, made once.

    Args:
        config: with ``compressor = "auto"``.
        network: of the reducer.
        states: of all parameters.
        device: of the gradients.
    """

    def __init__(
        self, config: CommConfig, network: Network, states: Sequence[ParamState], device: torch.device
    ) -> None:
        self._config = config
        self._network = network
        self._states = states
        self._device = device
        self._opened_s: float | None = None
        self._steps: list[tuple[float, float]] = []

    def next_step(self, meter: ReduceMeter) -> Choice | None:
        """A step begins, and the meter still has the one before. Returns the choice once enough steps were measured.

        The call that chooses is a collective one; it takes some seconds on a slow link.

        Raises:
            CommError: a peer died or the limit passed.
        """
        now = time.perf_counter()
        if self._opened_s is not None and meter.numel:
            self._steps.append((now - self._opened_s - meter.exposed_s, meter.hiding_s))
        self._opened_s = now
        if len(self._steps) < DENSE_STEPS:
            return None
        return self._choose(max(1, meter.buckets))

    def _choose(self, buckets: int) -> Choice:
        communicator = self._network.inter_node
        timing = timing_of(self._steps[1:], communicator, self._device)
        link = measure_link(communicator, self._device)
        compressed = [state for state in self._states if state.may_compress and state.param.requires_grad]
        shapes = shapes_of([torch.empty(state.shape, device="meta") for state in compressed])
        total = sum(state.param.numel() for state in self._states if state.param.requires_grad)
        numel = sum(state.param.numel() for state in compressed)
        options = []
        for config in candidates(self._config):
            codec_s_per_entry = measure_codec(config, communicator, self._device)
            options.append(
                candidate(config, shapes, total - numel, communicator.world_size, buckets, codec_s_per_entry)
            )
        return choose(options, link, timing, buckets)
