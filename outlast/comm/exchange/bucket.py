"""A bucket on its way, and futures whose outcome goes on to others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from outlast.comm.state.parameters import ParamState


@dataclass(slots=True, eq=False)
class BucketExchange:
    """A bucket on its way."""

    label: str
    states: list[ParamState]
    grads: list[Tensor]
    finished: Callable[[], None]
    """Called by the codec's thread once the estimates are written."""
    ready: torch.cuda.Event | None
    done: Future[None] = field(default_factory=Future)
    """Completed once the estimates are written, or with the error that kept them from it."""


class Fails(Protocol):
    """A future of either kind."""

    def done(self) -> bool: ...

    def set_exception(self, error: Any, /) -> None: ...


def complete(source: Future[None], target: Future[None]) -> None:
    """A finished future's outcome into another."""
    pass_error(source, target)
    if not target.done():
        target.set_result(None)


def pass_error(source: Future[Any], target: Fails) -> None:
    """The error of a finished future, if it has one, into another that still waits."""
    error = source.exception()
    if error is not None and not target.done():
        target.set_exception(error)
