"""What a session trains and saves, of whatever makes it up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from outlast.checkpoint import Checkpointer, Restored
from outlast.comm import ReduceStats
from outlast.diagnostics.numerics import NumericsConfig, NumericsEvent, NumericsWatch
from outlast.errors import SessionError
from outlast.session.scheduled_checkpoints import Collected

Tell = Callable[[str, NumericsEvent], None]
"""Takes a model's name, which is empty if there is one, and what was found in its numbers."""


class Trainable(ABC):
    """Models, what updates them and averages their gradients, and how they stand in a checkpoint.

    A session of models and optimizers makes its own. A loop that wraps its models and lays out its checkpoints itself,
    as outlast's trainer does, hands one to :class:`Session` in place of a model. All ranks call the same methods.
    """

    model: Any
    """What the loop calls: a model, or models by name."""
    device: torch.device
    """Where its tensors are."""
    comm: str
    """How gradients are averaged, in words."""

    @property
    @abstractmethod
    def lr(self) -> float:
        """The learning rate of the step; 0 if there is none."""

    @property
    def updates(self) -> int:
        """How many updates optimizers have made; 0 of a loop that is never left in the middle of a step."""
        return 0

    @abstractmethod
    def parameters(self) -> int:
        """How many entries are trained."""

    @abstractmethod
    def attach(self, checkpointer: Checkpointer) -> None:
        """Have updates wait until the last snapshot was copied, where the loop does not call ``wait_copied`` itself."""

    @abstractmethod
    def watch_numbers(self, config: NumericsConfig, tell: Tell) -> tuple[dict[str, NumericsWatch], list[str]]:
        """A watch for each model by its name, and what is not watched, in words. Collective."""

    def begin_step(self, step: int) -> None:  # noqa: B027 - most have nothing to do
        """A step begins."""

    @abstractmethod
    def end_step(self, step: int) -> ReduceStats:
        """The step's update is made; returns what the exchange of its gradients has cost, after waiting for it.

        Raises:
            SessionError: the step may not end here.
            CommError: an exchange failed.
        """

    @abstractmethod
    def collect(self, step: int) -> Collected:
        """The state after ``step``, to be saved; the tensors are live. May be collective."""

    @abstractmethod
    def like(self) -> Mapping[str, Any] | None:
        """Where ranks hold parts of tensors, the running state, into whose sharding a checkpoint is read. Else None."""

    @abstractmethod
    def load(self, restored: Restored, *, rank: int, world_size: int) -> list[str]:
        """Load a checkpoint, of whatever number of ranks. Collective.

        Args:
            restored: what :meth:`collect` was.
            rank: of this process, among today's.
            world_size: today's.

        Returns:
            What the checkpoint and this run do not share, in words.

        Raises:
            StateMismatch, CommStateMismatch: names what does not fit.
        """

    def add(self, name: str, holder: Any, replicated: bool | None) -> None:
        """Save this, too; see :meth:`Session.add`.

        Raises:
            SessionError: it cannot be saved.
        """
        raise SessionError(
            f"session.add({name}=...): what a {type(self).__name__} saves is its own choice",
            "let its collect() return this, too",
        )

    @abstractmethod
    def close(self) -> None:
        """Stop what runs in the background, and take hooks away."""
