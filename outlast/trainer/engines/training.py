"""What engines have in common."""

from __future__ import annotations

import math
from collections.abc import Collection

from outlast.errors import StateMismatch, TrainingDiverged


def check_norm(step: int, norm: float, what: str) -> None:
    """Raise unless the norm of what was averaged is finite; nothing has been updated yet.

    Raises:
        TrainingDiverged: it is not.
    """
    if not math.isfinite(norm):
        raise TrainingDiverged(
            f"step {step}: the {what} norm is {norm}; the parameters were not updated",
            "lower optim.lr, lengthen optim.warmup_steps, or resume from an earlier step with --resume STEP",
        )


def check_optimizer_names(saved: Collection[str], running: Collection[str]) -> None:
    """Raise unless all parameters that have saved optimizer state are in the model.

    Raises:
        StateMismatch: names those that are not.
    """
    unknown = sorted(set(saved) - set(running))
    if unknown:
        raise StateMismatch(
            f"the checkpoint has optimizer state for parameters that the model lacks: {', '.join(unknown)}"
        )
