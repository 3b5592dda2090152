"""The interface between the training loop and whatever replicates or shards the model, and updates it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.comm import ReduceStats
from outlast.trainer.batches import Batch

State = dict[str, Any]
EAGER = frozenset({"comm", "buffers"})
"""What forward and backward change."""
UNMEASURED = ReduceStats(wire_bytes=0, dense_bytes=0, codec_s=0.0, collective_s=0.0, exposed_s=0.0, collectives=0)


@dataclass(frozen=True, slots=True)
class EngineState:
    """Everything an engine needs to resume bit-identically. The tensors are the live ones, not copies.

    ``eager`` names the top-level keys whose tensors the next backward pass changes; the others change in the update.
    """

    replicated: State
    local: State
    eager: frozenset[str]


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

    def state(self) -> EngineState:
        """The state to save. Collective."""
        ...

    def like(self) -> State | None:
        """The running replicated state, into whose sharding a checkpoint is read; None: it is read whole."""
        ...

    def load(self, replicated: State, read_local: Callable[[int], State], ranks: int) -> None:
        """Load what :meth:`state` returned on ``ranks`` ranks, which may differ from the world size. Collective.

        ``read_local`` returns the local state of one of them.

        Raises:
            StateMismatch: names what does not match; the model is unchanged.
        """
        ...

    def close(self) -> None:
        """Stop background threads."""
        ...
