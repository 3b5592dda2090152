"""A tensor on its way, and the buffers and stages it passes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from outlast.comm.compressors.base import flat
from outlast.comm.direction import Direction
from outlast.comm.state.parameters import ParamState


class Stage(NamedTuple):
    """A piece of work and the thread it belongs to."""

    thread: Literal["codec", "wire"]
    work: Callable[[], None]


@dataclass(slots=True)
class Presence:
    """Whether a tensor takes part in a step. One that no rank used does not: its gradient stays as it is, and its state
    too, so that what is not applied is not lost."""

    here: bool
    """Whether this rank used it."""
    anywhere: bool = True
    """Whether some rank did; agreed on before the exchange."""


@dataclass(slots=True)
class Item:
    """One tensor to average over ranks, in place.

    Attributes:
        state: its parameter's.
        grad: of the state's shape; read when the exchange encodes, and overwritten with the estimate when it decodes.
            Nobody else may touch it in between.
        direction: applied to the gradient before it is compressed; to tensors that never are, after the mean.
        scale: the factor in ``grad``; the estimate gets it too, the state does not.
        presence: None where it takes part whatever happens.
    """

    state: ParamState
    grad: Tensor
    direction: Direction | None = None
    scale: float = 1.0
    presence: Presence | None = None

    @property
    def absent(self) -> bool:
        """Whether no rank used it; known once the exchange begins."""
        return self.presence is not None and not self.presence.anywhere

    def read(self) -> Tensor:
        """The gradient, contiguous, unscaled, in the type it is summed in; a view where possible."""
        g = flat(self.grad).view(self.state.shape)
        return g if self.scale == 1.0 else g / self.scale

    def to_compress(self) -> Tensor:
        """The input of error feedback: the gradient or its direction; valid until the next call in this thread."""
        g = self.read()
        return g if self.direction is None else self.state.direction_of(self.direction, g)

    def target(self) -> Tensor:
        """Where an estimate is written: the gradient itself where it is contiguous and of the right type."""
        if self.grad.is_contiguous() and self.grad.dtype == self.state.dtype:
            return self.grad.detach().view(self.state.shape)
        return torch.empty(self.state.shape, dtype=self.state.dtype, device=self.grad.device)

    def write(self, estimate: Tensor) -> None:
        """The estimate into the gradient, unless it was written there; scaled."""
        if estimate.data_ptr() != self.grad.data_ptr():
            self.grad.copy_(estimate.view(self.grad.shape))
        if self.scale != 1.0:
            self.grad.mul_(self.scale)
