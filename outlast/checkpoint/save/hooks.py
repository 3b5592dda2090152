"""Hooks into what trains, so that a loop need not call a Checkpointer at the right moments itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Hooks:
    """Those that were set, until they are removed.

    Args:
        before_update: called before each step of an optimizer.
        between: called in backward, whenever a gradient was accumulated.
    """

    def __init__(self, before_update: Callable[[], object], between: Callable[[], object]) -> None:
        self._before_update = before_update
        self._between = between
        self._handles: list[RemovableHandle] = []

    def set(self, watched: nn.Module | torch.optim.Optimizer) -> None:
        """Hook a module's parameters, or an optimizer."""
        if isinstance(watched, torch.optim.Optimizer):
            self._handles.append(watched.register_step_pre_hook(self._step))
            return
        for parameter in watched.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def remove(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _step(self, *_: object) -> None:
        self._before_update()

    def _accumulated(self, _: torch.Tensor) -> None:
        self._between()
