"""What a session saves, and how it is put back: models, optimizers, compression, random numbers, the user's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.comm import Reducer
from outlast.errors import SessionError, StateMismatch
from outlast.session.models import State, Trained, split

EAGER = frozenset({"comm", "rng", "buffers", "module_buffers", "parts", "own_parts"})
"""Top-level keys whose tensors the next step may change before the update; they are copied at once."""


class Stateful(Protocol):
    """What has state of its own."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Part:
    """State of the user's own."""

    name: str
    holder: Stateful
    replicated: bool
    """Equal on all ranks; otherwise each rank's own."""

    @property
    def module(self) -> nn.Module | None:
        """The module that it is, if so: its parameters are equal on all ranks, its buffers each rank's own."""
        return self.holder if self.replicated and isinstance(self.holder, nn.Module) else None


@dataclass(slots=True)
class SessionState:
    """The state of one rank."""

    trained: Sequence[Trained]
    reducers: dict[str, Reducer]
    """By the model's name."""
    parts: dict[str, Part] = field(default_factory=dict)

    def add(self, name: str, holder: Any, replicated: bool | None) -> None:
        """Save this, too.

        Raises:
            SessionError: the name is taken, or there is no ``state_dict`` and ``load_state_dict``.
        """
        lacking = [
            method for method in ("state_dict", "load_state_dict") if not callable(getattr(holder, method, None))
        ]
        if lacking:
            raise SessionError(
                f"session.add({name}=...): a {type(holder).__name__} has no {' and no '.join(lacking)}",
                "give it both, as torch's own objects have them; what is a function of the step need not be saved",
            )
        if name in self.parts:
            raise SessionError(f"session.add({name}=...): there is a part of this name", "choose another name")
        if any(holder is one.optimizer or holder is one.model for one in self.trained):
            raise SessionError(f"session.add({name}=...): the session saves this already", "leave it out")
        if replicated is None:
            replicated = isinstance(holder, (nn.Module, Optimizer, LRScheduler, GradScaler))
        self.parts[name] = Part(name, holder, replicated)

    @property
    def scaler(self) -> GradScaler | None:
        """The gradient scaler among the parts, if there is one."""
        return next((part.holder for part in self.parts.values() if isinstance(part.holder, GradScaler)), None)

    def replicated(self) -> State:
        """What is equal on all ranks."""
        models, optimizers, aggregates = {}, {}, {}
        for one in self.trained:
            models[one.name], _, optimizers[one.name] = one.state()
        for name, reducer in self.reducers.items():
            comm = reducer.state_dict()
            aggregates[name] = {"aggregate": comm["replicated"], "meta": comm["meta"]}
        shared = [part for part in self.parts.values() if part.replicated]
        found = {
            "model": _folded(models),
            "optimizer": _folded(optimizers),
            "comm": _folded(aggregates),
            "modules": {part.name: split(part.module)[0] for part in shared if part.module is not None},
            "parts": {part.name: part.holder.state_dict() for part in shared if part.module is None},
        }
        return {key: value for key, value in found.items() if value}

    def local(self) -> State:
        """What is this rank's own."""
        found = {
            "rng": rng_state(),
            "buffers": _folded({one.name: one.state()[1] for one in self.trained}),
            "module_buffers": {one.name: split(one.module)[1] for one in self.parts.values() if one.module is not None},
            "comm": _folded({name: reducer.state_dict()["local"] for name, reducer in self.reducers.items()}),
            "own_parts": {part.name: part.holder.state_dict() for part in self.parts.values() if not part.replicated},
        }
        return {key: value for key, value in found.items() if value}

    def load(
        self,
        replicated: Mapping[str, Any],
        read_local: Callable[[int], Mapping[str, Any]],
        *,
        rank: int,
        world_size: int,
        saved_by: int,
    ) -> list[str]:
        """Load what ``saved_by`` ranks saved.

        Args:
            replicated: what :meth:`replicated` was.
            read_local: what :meth:`local` was on one of these ranks.
            rank: of this process, among today's.
            world_size: today's.
            saved_by: the world size then.

        Returns:
            What the checkpoint and this session do not share, in words.

        Raises:
            StateMismatch, CommStateMismatch: names what does not fit.
        """
        anew: list[str] = []
        source = rank if rank < saved_by else 0  # of what ranks have of their own, but new ranks need as well
        own = read_local(source)
        models, optimizers = (_unfolded(replicated.get(key, {}), self._names) for key in ("model", "optimizer"))
        buffers = _unfolded(own.get("buffers", {}), self._names)
        for one in self.trained:
            one.load(models.get(one.name, {}), buffers.get(one.name, {}), optimizers.get(one.name, {}))
        self._load_comm(replicated, read_local, saved_by, anew)
        self._load_parts(replicated, own, saved_by, world_size, anew)
        if rank < saved_by:
            load_rng_state(own["rng"])
        else:
            anew.append(f"there are no random-number states of rank {rank}, which is new")
        return anew

    @property
    def _names(self) -> list[str]:
        return [one.name for one in self.trained]

    def _load_comm(
        self,
        replicated: Mapping[str, Any],
        read_local: Callable[[int], Mapping[str, Any]],
        saved_by: int,
        anew: list[str],
    ) -> None:
        aggregates = _unfolded(replicated.get("comm", {}), self._names)
        unused = sorted(name for name, state in aggregates.items() if state and name not in self.reducers)
        for name in unused:
            of = f" of {name}" if name else ""
            anew.append(f"error feedback{of} is not used now: what had not been sent yet, and moments it had, are lost")
        for name, reducer in self.reducers.items():
            aggregate = aggregates.get(name)
            if not aggregate:
                anew.append("there is no error feedback" + (f" of {name}" if name else "") + ": it begins anew")
                continue

            def read(rank: int, name: str = name, aggregate: State = aggregate) -> State:
                local = _unfolded(read_local(rank).get("comm", {}), self._names)
                return {
                    "replicated": aggregate.get("aggregate", {}),
                    "meta": aggregate["meta"],
                    "local": local.get(name, {}),
                }

            reducer.load_resharded(read, saved_by)

    def _load_parts(
        self,
        replicated: Mapping[str, Any],
        own: Mapping[str, Any],
        saved_by: int,
        world_size: int,
        anew: list[str],
    ) -> None:
        shared = {**replicated.get("modules", {}), **replicated.get("parts", {})}
        for part in self.parts.values():
            if part.replicated:
                state = shared.get(part.name)
                buffers = own.get("module_buffers", {}).get(part.name)
                if state is not None and buffers is not None:
                    state = {**state, **buffers}
            elif saved_by != world_size:
                raise StateMismatch(
                    f"{part.name} is each rank's own, and was saved by {saved_by} ranks; this job has {world_size}",
                    f"resume on {saved_by} ranks; or make {part.name} a function of the step, or equal on all ranks, "
                    f"and say so: session.add(replicated=True, {part.name}=...)",
                )
            else:
                state = own.get("own_parts", {}).get(part.name)
            if state is None:
                anew.append(f"there is no {part.name}: it goes on as it is")
            else:
                part.holder.load_state_dict(state)


def _folded(by_name: Mapping[str, Any]) -> Any:
    """What one model without a name has stands for itself."""
    return by_name[""] if list(by_name) == [""] else {name: value for name, value in by_name.items() if value}


def _unfolded(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {"": dict(state)} if list(names) == [""] else dict(state)
