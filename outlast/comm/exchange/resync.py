"""Replaces the running means, which drift by rounding, by exact ones."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from outlast.comm.exchange.topology import Network
from outlast.comm.feedback import Feedback
from outlast.comm.slices import slices
from outlast.comm.state.parameters import ParameterStates
from outlast.comm.state.reshard import resync, tracked
from outlast.comm.transport.communicator import Communicator, settle, slowest


def resync_all(states: ParameterStates, feedback: Feedback | None, network: Network, two_phase: bool) -> float:
    """For every tensor; a collective call. Returns the largest relative drift found, the same on every rank.

    Raises:
        CommError: a peer failed.
    """
    worst = 0.0
    for state in states.params.values():
        if feedback is None or not state.local or not state.replicated:
            continue
        own = tracked(feedback, state.local)
        if own is None:
            continue
        flat, among = own.reshape(-1), network.inter_node
        settle(flat.device)  # the communicator has a stream of its own
        mean = among.run(partial(_settled_mean, among, flat, state.name), f"resync of {state.name}").view(own.shape)
        aggregates = state.replicated
        if two_phase:
            aggregates, mean = state.owner_slots(feedback), slices(mean, state.units)[state.rank]
        worst = max(worst, resync(aggregates, mean))
    return slowest(network.all_ranks, worst, states.device)


def _settled_mean(among: Communicator, flat: Tensor, name: str) -> Tensor:
    mean = among.mean(flat, f"resync of {name}")
    settle(mean.device)
    return mean
