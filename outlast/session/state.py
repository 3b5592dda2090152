"""What a session saves, and how it is put back: models, optimizers, compression, random numbers, the user's parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from outlast.checkpoint import Restored
from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.comm import Reducer
from outlast.errors import SessionError, StateMismatch
from outlast.session.buffers import of_rank_0
from outlast.session.deepspeed import TrainedEngine, is_header
from outlast.session.models import State, Trained, split, tensors_in
from outlast.session.scheduled_checkpoints import Collected

_EAGER = frozenset({"rng", "buffers", "module_buffers", "parts", "own_parts"})


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

    @property
    def engines(self) -> list[TrainedEngine]:
        """The DeepSpeed engines among the models."""
        return [one for one in self.trained if isinstance(one, TrainedEngine)]

    def collect(self) -> Collected:
        """What is to be saved now. The tensors are live. Collective if there are buffers or DeepSpeed engines."""
        models, optimizers, buffers = {}, {}, {}
        sharded = any(one.is_sharded for one in self.trained)  # then no more is read than they had when it was saved
        for one in self.trained:
            if not isinstance(one, TrainedEngine):
                models[one.name], buffers[one.name], optimizers[one.name] = one.state()
                if not sharded:
                    models[one.name] |= of_rank_0(tensors_in(buffers[one.name]))
        shared = [part for part in self.parts.values() if part.replicated]
        modules = {part.name: split(part.module) for part in shared if part.module is not None}
        replicated: State = {
            "model": _folded(models),
            "optimizer": _folded(optimizers),
            "modules": {name: params for name, (params, _) in modules.items()},
            "parts": {part.name: part.holder.state_dict() for part in shared if part.module is None},
        }
        local: State = {
            "rng": rng_state(),
            "buffers": _folded(buffers),
            "module_buffers": {name: rest for name, (_, rest) in modules.items()},
            "own_parts": {part.name: part.holder.state_dict() for part in self.parts.values() if not part.replicated},
        }
        eager = _EAGER
        for engine in self.engines:
            state = engine.collect()
            replicated |= state[0]
            local |= state[1]
            eager |= state[2]
        for name, reducer in self.reducers.items():
            comm = reducer.checkpoint_parts(_comm_key(name))
            replicated |= comm.replicated
            local |= comm.local
            eager |= comm.eager
        return Collected(_filled(replicated), _filled(local), eager)

    def load(self, restored: Restored, *, rank: int, world_size: int) -> list[str]:
        """Load a checkpoint, of whatever number of ranks.

        Args:
            restored: what :meth:`collect` was.
            rank: of this process, among today's.
            world_size: today's.

        Returns:
            What the checkpoint and this session do not share, in words.

        Raises:
            StateMismatch, CommStateMismatch: names what does not fit.
        """
        anew: list[str] = []
        saved_by, replicated = restored.world_size, restored.replicated
        # Of what ranks have of their own, new ranks need some as well: they take rank 0's.
        own = restored.local if saved_by == world_size else restored.read_local(rank if rank < saved_by else 0)
        names = [one.name for one in self.trained]
        models, optimizers = (_unfolded(replicated.get(key, {}), names) for key in ("model", "optimizer"))
        buffers = _unfolded(own.get("buffers", {}), names)
        self._check_engines(replicated)
        for one in self.trained:
            key, of = _comm_key(one.name), f" of {one.name}" if one.name else ""
            comm = replicated.get(key)
            optimizer = optimizers.get(one.name, {})
            if not optimizer and comm is not None and not one.is_kept:  # it was kept, and is not any more
                optimizer = comm.get("optimizer", {})
            if isinstance(one, TrainedEngine):
                one.load_collected(replicated, restored.read_local, saved_by)
            else:
                one.load(models.get(one.name, {}), buffers.get(one.name, {}), optimizer)
            reducer = self.reducers.get(one.name)
            if reducer is not None and comm is not None:
                reducer.load_parts(restored, name=key)
            elif reducer is not None:
                anew.append(f"there is no error feedback{of}: it begins anew")
            elif comm is not None:
                lost = "what had not been sent yet, and moments it had, are lost"
                anew.append(f"error feedback{of} is not used now: {lost}")
        self._load_parts(replicated, own, saved_by, world_size, anew)
        if rank < saved_by:
            load_rng_state(own["rng"])
        else:
            anew.append(f"there are no random-number states of rank {rank}, which is new")
        return anew

    def _check_engines(self, replicated: Mapping[str, Any]) -> None:
        """What DeepSpeed has saved, nobody else can load."""
        known = {engine.header for engine in self.engines}
        unknown = [key for key, value in replicated.items() if is_header(key, value) and key not in known]
        if unknown:
            raise StateMismatch(
                f"the checkpoint holds the state of a DeepSpeed engine ({', '.join(unknown)}), and this session has "
                "none of this name",
                "give the session what deepspeed.initialize returned, under the name that it had; or begin a new run",
            )

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


def _comm_key(name: str) -> str:
    """Under which the state of a model's reducer is saved."""
    return f"comm_{name}" if name else "comm"


def _filled(state: State) -> State:
    return {key: value for key, value in state.items() if value}


def _folded(by_name: Mapping[str, Any]) -> Any:
    """What one model without a name has stands for itself."""
    return by_name[""] if list(by_name) == [""] else {name: value for name, value in by_name.items() if value}


def _unfolded(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {"": dict(state)} if list(names) == [""] else dict(state)
