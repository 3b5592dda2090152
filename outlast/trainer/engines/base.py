"""The interface between the training loop and whatever replicates or shards the model, and updates it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.checkpoint import Restored
from outlast.comm import ReduceStats
from outlast.session.scheduled_checkpoints import Collected
from outlast.trainer.batches import Batch

State = dict[str, Any]
EAGER = frozenset({"comm", "buffers"})
"""What forward and backward change."""
UNMEASURED = ReduceStats(wire_bytes=0, dense_bytes=0, codec_s=0.0, collective_s=0.0, exposed_s=0.0, collectives=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """One update of the parameters: its learning rate, and the norm of what the ranks averaged, before clipping."""

    lr: float
    grad_norm: float | None = None
    """Norm of the averaged gradient; None where updates are averaged, or the engine does not tell."""
    update_norm: float | None = None
    """Norm of the averaged update, Adam's direction; None where gradients are averaged."""
    reduced: ReduceStats = UNMEASURED
    """What the exchange of the gradients has cost; zeros where the engine's own library exchanges them."""

    @classmethod
    def of(cls, norm: float | None, lr: float, reduced: ReduceStats, *, of_updates: bool) -> UpdateStats:
        """With the norm of averaged updates, or else of averaged gradients."""
        norms = (None, norm) if of_updates else (norm, None)
        return cls(lr=lr, grad_norm=norms[0], update_norm=norms[1], reduced=reduced)


class Engine(Protocol):
    """Owns the model, optimizer, scheduler and gradient exchange.

    A step is ``forward_backward``, then ``update``. All ranks call the same methods in the same order.
    ``forward_backward`` is collective: when a peer fails it raises within the timeout of ``[comm]``, and the engine
    cannot be used again.
    """

    model: nn.Module

    @property
    def optimizer(self) -> Optimizer | None:
        """What updates the model's parameters; None where a library has it inside."""
        ...

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> float:
        """Mean loss of this rank's micro-batches; sets ``.grad`` to averages."""
        ...

    def update(self, step: int) -> UpdateStats:
        """Clip, update parameters, advance the schedule."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """Mean loss of this rank's batches, a scalar on the engine's device; no state changes."""
        ...

    def state(self) -> Collected:
        """Everything that it needs to resume bit-identically. Collective.

        Top-level keys that are eager are those whose tensors the next backward changes; the others change in the
        update.
        """
        ...

    def like(self) -> State | None:
        """The running replicated state, into whose sharding a checkpoint is read; None: it is read whole."""
        ...

    def load(self, restored: Restored) -> None:
        """Load what :meth:`state` returned, on however many ranks. Collective.

        Raises:
            StateMismatch: names what does not match; the model is unchanged.
        """
        ...

    def close(self) -> None:
        """Stop background threads."""
        ...
