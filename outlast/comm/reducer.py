"""What every reducer offers, whatever it was attached to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from outlast.comm.config import CommConfig
from outlast.comm.exchange.stats import ReduceStats
from outlast.errors import CommError


class Reducer(Protocol):
    """Averages gradients over ranks, compressed. DDP, FSDP2 and DeepSpeed share this interface::

        with outlast.comm.attach(ddp, target="gradient", feedback="ef21", density=0.05) as reducer:
            for step in range(1, 1001):
                optimizer.zero_grad()
                reducer.begin_step(step)
                loss(ddp, step).backward()
                stats = reducer.end_step()
                optimizer.step()

    All calls belong to one thread.

    Failure: when a peer dies or stays silent for ``config.timeout_s``, or a gradient that is compressed holds NaN or
    Inf, ``backward()`` raises, and so does every later call but :meth:`close`. Gradients and state are then undefined:
    end the process and resume from a checkpoint.
    """

    config: CommConfig
    """The settings it was made with."""
    world_size: int
    """How many ranks exchange gradients with one another: all, or with HSDP the copies of a shard."""

    @abstractmethod
    def begin_step(self, step: int, loss_scale: float | None = None) -> None:
        """Say which step the next backward belongs to; the warm-up depends on it. Optional.

        Args:
            step: counts from 1.
            loss_scale: the factor in the loss, ``GradScaler.get_scale()``; for DDP alone, others refuse it.

        Raises:
            CommError: an exchange has failed, the reducer was closed, this cannot be the next step, or ``loss_scale``
                does not apply.
        """

    @abstractmethod
    def end_step(self) -> ReduceStats:
        """Wait for the step's exchanges and return what they cost.

        Raises:
            CommError: an exchange has failed, in this step or before.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Error-feedback state for a checkpoint; call it between steps.

        Returns:
            ``{"local": {parameter: {slot: tensor}}, "replicated": {parameter: {slot: tensor}}, "meta": {...}}``. Local
            tensors differ on every rank and must be saved by each; replicated ones are the same on all ranks; ``meta``
            is plain JSON. The tensors are *live*: the next backward changes them.

        Raises:
            CommError: an exchange has failed.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], *, strict: bool = True) -> tuple[str, ...]:
        """Load a copy of what :meth:`state_dict` returned on the same rank; training goes on bit for bit.

        Args:
            state: of this rank.
            strict: False takes the state of those parameters that it fits. The others, of which parameters or state are
                missing (frozen, ignored or thawed since), begin without any, as at the first step. Pass the same on all
                ranks.

        Returns:
            The names of the parameters whose state was not taken, in either direction; empty if ``strict``.

        Raises:
            CommStateMismatch: names what does not fit; nothing has been loaded then.
            CommError: an exchange has failed.
        """

    @abstractmethod
    def load_resharded(
        self, read: Callable[[int], Mapping[str, Mapping[str, Any]]], ranks: int, *, strict: bool = True
    ) -> tuple[str, ...]:
        """Load the state that ``ranks`` ranks saved. With as many ranks as today this is :meth:`load_state_dict`.

        Args:
            read: returns what :meth:`state_dict` was on a given rank of the run that saved.
            ranks: how many ranks saved.
            strict: see :meth:`load_state_dict`, as for what is returned.

        Raises:
            CommStateMismatch: state of this kind cannot be redistributed over another world size, or does not fit;
                nothing has been loaded then.
            CommError: an exchange has failed.
        """

    @abstractmethod
    def close(self) -> None:
        """End the reducer's threads and give the model its own averaging back where that is possible. Not a collective
        call; closing twice is harmless.

        Raises:
            CommError: a collective did not end within the limit.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def refuse_loss_scale(loss_scale: float | None, what: str) -> None:
    """For reducers whose error feedback cannot follow a loss scale.

    Raises:
        CommError: there is one.
    """
    if loss_scale is not None:
        raise CommError(
            f"loss_scale = {loss_scale:g}: error feedback cannot follow a loss scale under {what}",
            "use bfloat16, which needs none, and leave out loss_scale",
        )
