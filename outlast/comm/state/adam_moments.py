"""A reducer's moments, seen as the state of ``torch.optim.Adam``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from outlast.comm.compressors import Slots
from outlast.comm.state.parameters import ParameterStates


class AdamState(NamedTuple):
    """One parameter's, as ``torch.optim.Adam`` has it."""

    step: Tensor
    """Scalar, float32: gradients so far."""
    exp_avg: Tensor
    """First moment, with the parameter's shape."""
    exp_avg_sq: Tensor
    """Second moment, with the parameter's shape."""


class Moments(Protocol):
    """Where a reducer keeps the moments of its parameters."""

    def has(self, param: Tensor) -> bool:
        """Whether the reducer averages the gradients of this parameter."""
        ...

    def read(self, param: Tensor) -> AdamState | None:
        """Its moments, live where the reducer has them: the next backward changes them. None before the first
        gradient."""
        ...

    def write(self, param: Tensor, state: AdamState | None) -> None:
        """Adopt copies; None: begin anew."""
        ...


class WholeMoments:
    """Of parameters that each rank has whole.

    Args:
        states: of the parameters.
    """

    def __init__(self, states: ParameterStates) -> None:
        self._states = states

    def has(self, param: Tensor) -> bool:
        """See :class:`Moments`."""
        return self._states.knows(param)

    def read(self, param: Tensor) -> AdamState | None:
        """See :class:`Moments`. Without a first moment it is zero."""
        moments = self._states.of(param).moments
        if moments is None:
            return None
        return AdamState(moments["t"], first_moment(moments), moments["v"])

    def write(self, param: Tensor, state: AdamState | None) -> None:
        """See :class:`Moments`. A first moment that the direction does not have is left out."""
        of = self._states.of(param)
        direction = self._states.direction
        assert direction is not None
        of.moments = None if state is None else taken(state, direction.slots, of.dtype, of.param.device)


def first_moment(moments: Slots) -> Tensor:
    """The slot, or zeros where the direction has none."""
    return moments["m"] if "m" in moments else torch.zeros_like(moments["v"])


def taken(state: AdamState, slots: Sequence[str], dtype: torch.dtype, device: torch.device) -> Slots:
    """Copies of ``state`` as a direction's slots."""
    named: dict[str, Any] = {
        "m": (state.exp_avg, dtype),
        "v": (state.exp_avg_sq, dtype),
        "t": (state.step, torch.float32),
    }
    return {
        slot: named[slot][0].detach().to(device, named[slot][1], copy=True, memory_format=torch.contiguous_format)
        for slot in slots
    }
