"""What Accelerate and torch.compile have put around models and optimizers, taken off."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import Optimizer


def without_compile(model: Any) -> Any:
    """The model without torch.compile around it; DDP stays."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def bare_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer that Accelerate has wrapped."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
