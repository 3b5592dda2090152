"""Inspect, verify, compare and prune checkpoints, without a training run."""

from outlast.checkpoint.tools.diff import Comparison, TensorDifference, ValueDifference, diff
from outlast.checkpoint.tools.inspect import (
    Problem,
    StepDescription,
    StepInfo,
    TensorInfo,
    Verification,
    describe,
    list_steps,
    verify,
)
from outlast.checkpoint.tools.memory import InMemory, StepInMemory, list_memory, remove_memory
from outlast.checkpoint.tools.prune import Pruning, Removal, prune

__all__ = [
    "Comparison",
    "InMemory",
    "Problem",
    "Pruning",
    "Removal",
    "StepDescription",
    "StepInMemory",
    "StepInfo",
    "TensorDifference",
    "TensorInfo",
    "ValueDifference",
    "Verification",
    "describe",
    "diff",
    "list_memory",
    "list_steps",
    "prune",
    "remove_memory",
    "verify",
]
