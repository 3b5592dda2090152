"""Hooks on modules and optimizers, so that a loop need not call a Checkpointer at the right moments itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Hooks:
    """The hooks of one Checkpointer, until they are removed.

    Args:
        before_update: called before each step of an optimizer.
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

    def _step(self, *_: object) -> None:
        self._before_update()

    def _accumulated(self, _: torch.Tensor) -> None:
        self._after_gradient()
