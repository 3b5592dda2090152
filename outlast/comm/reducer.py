"""What every reducer offers, whatever it was attached to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch.distributed as dist

from outlast.comm.config import CommConfig
from outlast.comm.exchange.kept_optimizer import KeptOptimizer
from outlast.comm.exchange.stats import ReduceStats
from outlast.errors import CommError, CommStateMismatch


class CheckpointParts(NamedTuple):
    """A reducer's state as ``Checkpointer.save`` takes it: each field is the argument of that name."""

    replicated: dict[str, Any]
    """Equal on all ranks; the groups of an optimizer that is kept are here."""
    local: dict[str, Any]
    """This rank's own."""
    eager: frozenset[str]
    """The next backward changes them."""


class SavedParts(Protocol):
    """A checkpoint that was read back, as ``Checkpointer.restore`` returns it."""

    @property
    def replicated(self) -> Mapping[str, Any]:
        """What was equal on all ranks."""
        ...

    @property
    def local(self) -> Mapping[str, Any]:
        """What was this rank's own; of no meaning where another world size saved."""
        ...

    @property
    def world_size(self) -> int:
        """Of the job that saved."""
        ...

    @property
    def read_local(self) -> Callable[[int], Mapping[str, Any]]:
        """What was a given rank's own."""
        ...


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
    kept: KeptOptimizer | None = None
    """The program's own optimizer, if it was handed over."""

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

    def checkpoint_parts(self, name: str = "comm") -> CheckpointParts:
        """Its whole state, split for a checkpoint; call it between steps::

            reducer = outlast.comm.attach(ddp, optimizer=optimizer)
            with outlast.checkpoint.attach("runs/mine") as checkpointer:
                comm = reducer.checkpoint_parts()
                replicated = {"model": model.state_dict(), **comm.replicated}
                checkpointer.save(step, replicated=replicated, local=comm.local, eager=comm.eager)

        Args:
            name: the top-level key. Of several reducers each has its own.

        Returns:
            The parts, with live tensors. An optimizer that is kept is in them: its groups, and its moments, which are
            the reducer's. It need not be saved otherwise.

        Raises:
            CommError: an exchange has failed.
        """
        state = self.state_dict()
        replicated: dict[str, Any] = {"aggregate": state["replicated"], "meta": state["meta"]}
        if self.kept is not None:
            replicated["optimizer"] = self.kept.own_state_dict()
        return CheckpointParts({name: replicated}, {name: state["local"]}, frozenset({name}))

    def load_parts(self, restored: SavedParts, *, name: str = "comm", strict: bool = True) -> tuple[str, ...]:
        """Load what :meth:`checkpoint_parts` was, or ``local={name: reducer.state_dict()}``; training goes on bit for
        bit.

        Saved by another number of ranks, it is redistributed, as :meth:`load_resharded` says.

        Args:
            restored: the checkpoint.
            name: as it was saved.
            strict: see :meth:`load_state_dict`.

        Returns:
            As :meth:`load_state_dict`.

        Raises:
            CommStateMismatch: there is no such state, or it does not fit; nothing has been loaded then.
            CommError: an exchange has failed, or the optimizer's groups cannot be followed.
        """
        same = restored.world_size == (dist.get_world_size() if dist.is_initialized() else 1)
        shared = restored.replicated.get(name)
        of_optimizer = None if shared is None else shared.get("optimizer")
        if shared is None and name not in (restored.local if same else restored.read_local(0)):
            raise CommStateMismatch(
                f"the checkpoint has no state of a reducer under {name!r}",
                "it was saved without compression, or under another name: pass name=, or leave out load_parts(), and "
                "what error feedback keeps begins anew",
            )
        if shared is not None and "aggregate" not in shared:
            raise CommStateMismatch(
                f"the tensors that are equal on all ranks were left out of {name!r} when the checkpoint was read",
                "restore() it without like= and into=, which have no such tensors, and load the parts from what that "
                "returns",
            )
        if of_optimizer is not None:
            if self.kept is None:
                raise CommStateMismatch(
                    f"the checkpoint has, under {name!r}, the groups of an optimizer that the reducer had",
                    "hand the optimizer over: outlast.comm.attach(model, optimizer=optimizer)",
                )
            self.kept.check_state_dict(of_optimizer)

        def joined(local: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
            own: Mapping[str, Any] = local.get(name, {})
            if shared is None:
                return own
            return {"local": own, "replicated": shared["aggregate"], "meta": shared["meta"]}

        if same:
            left = self.load_state_dict(joined(restored.local), strict=strict)
        else:
            self._refuse_part_of_the_ranks(restored.world_size)
            left = self.load_resharded(
                lambda rank: joined(restored.read_local(rank)), restored.world_size, strict=strict
            )
        if of_optimizer is not None and self.kept is not None:
            self.kept.load_own_state_dict(of_optimizer)
        return left

    def _refuse_part_of_the_ranks(self, saved_by: int) -> None:
        """Which of the saved ranks were a smaller group's is not known here."""
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if self.world_size != ranks:
            raise CommStateMismatch(
                f"the checkpoint was saved by {saved_by} ranks, there are {ranks} now, and this reducer averages over "
                f"{self.world_size} of them",
                "call load_resharded(read, ranks), where read(i) reads the state of the i-th rank of that group",
            )

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
