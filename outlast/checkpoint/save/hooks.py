"""Hooks on modules and optimizers, so that a loop need not call a Checkpointer at the right moments itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Hooks:
    """The hooks of one Checkpointer, until they are removed.

    Args:
        before_update: called before each step of an optimizer; of torch's own, after the closure, if there is one.
        after_gradient: called in backward, whenever a gradient was accumulated.
    """

    def __init__(self, before_update: Callable[[], object], after_gradient: Callable[[], object]) -> None:
        self._before_update = before_update
        self._after_gradient = after_gradient
        self._handles: list[RemovableHandle] = []

    def set(self, watched: nn.Module | torch.optim.Optimizer) -> None:
        """Hook an optimizer, or a module's parameters."""
        if isinstance(watched, torch.optim.Optimizer):
            self._handles.append(watched.register_step_pre_hook(self._step))
            return
        for parameter in watched.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # torch's own optimizers call a closure before they change anything: forward and backward are in it, and they
        # need not wait. What another optimizer does before it calls one is not known.
        if type(optimizer).__module__.partition(".")[0] == "torch":
            if callable(kwargs.get("closure")):
                return args, kwargs | {"closure": self._then_wait(kwargs["closure"])}
            if len(args) == 2 and callable(args[1]):
                return (args[0], self._then_wait(args[1])), kwargs
        self._before_update()
        return None

    def _then_wait(self, closure: Callable[[], object]) -> Callable[[], object]:
        @functools.wraps(closure)
        def called() -> object:
            result = closure()
            self._before_update()
            return result

        return called

    def _accumulated(self, _: torch.Tensor) -> None:
        self._after_gradient()
