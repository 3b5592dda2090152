"""What a session saves, and how it is put back: models, optimizers, compression, random numbers, the user's parts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from outlast.checkpoint import Checkpointer, Restored
from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.comm import ReduceStats
from outlast.diagnostics.numerics import NumericsConfig, NumericsWatch
from outlast.errors import SessionError, StateMismatch
from outlast.session.buffers import of_rank_0
from outlast.session.compression import Comm, attach_reducers, cost_of_step
from outlast.session.deepspeed import TrainedEngine, is_header, trained
from outlast.session.models import State, device_of, split, tensors_in, unwrapped, wrapped
from outlast.session.scheduled_checkpoints import Collected
from outlast.session.trainable import Tell, Trainable

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


class SessionState(Trainable):
    """The models of a session on one rank. Making it is collective: bare models are put into DDP.

    Args:
        models: by name.
        optimizers: by the names of their models.
        comm: see :class:`Session`.
        world_size: the number of ranks.

    Raises:
        UnknownKey, UnknownCompressor, OutOfRange, CommError: see :func:`outlast.comm.attach`.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], comm: Comm, world_size: int
    ) -> None:
        models = {name: wrapped(each, world_size) for name, each in models.items()}
        self.model = models.get("", models)
        self.device = device_of(models.values())
        self.trained = [trained(name, each, optimizers.get(name)) for name, each in models.items()]
        self.reducers = attach_reducers(self.trained, comm, world_size)
        """By the model's name."""
        self.comm = "; ".join(one.config.describe() for one in self.reducers.values()) or "dense"
        self.parts: dict[str, Part] = {}
        self._stack = contextlib.ExitStack()
        for reducer in self.reducers.values():
            self._stack.callback(reducer.close)
        for one in self.trained:
            self._stack.callback(one.count_updates())

    @property
    def lr(self) -> float:
        """Of the first optimizer."""
        return next((one.lr for one in self.trained if one.lr is not None), 0.0)

    @property
    def updates(self) -> int:
        """See :class:`Trainable`."""
        return sum(one.updates for one in self.trained)

    def parameters(self) -> int:
        """See :class:`Trainable`."""
        return sum(one.parameters() for one in self.trained)

    def attach(self, checkpointer: Checkpointer) -> None:
        """See :class:`Trainable`.

        Raises:
            CheckpointError: DeepSpeed is set up for something that outlast cannot save; names it.
        """
        for one in self.trained:
            if isinstance(one, TrainedEngine):
                self._stack.callback(one.close)
                one.attach().before_update(checkpointer.wait_copied)
            else:
                checkpointer.watch(unwrapped(one.model), *([] if one.optimizer is None else [one.optimizer]))

    def watch_numbers(self, config: NumericsConfig, tell: Tell) -> tuple[dict[str, NumericsWatch], list[str]]:
        """See :class:`Trainable`. DeepSpeed's engines keep gradients and parameters of their own."""
        watches: dict[str, NumericsWatch] = {}
        left_out: list[str] = []
        for one in self.trained:
            if isinstance(one, TrainedEngine):
                left_out.append(f"{one.name or 'the model'} is a DeepSpeed engine, whose numbers are not watched")
            else:
                watch = NumericsWatch(one.model, one.optimizer, config, on_event=partial(tell, one.name))
                watches[one.name] = watch
                left_out += watch.not_watched
        return watches, left_out

    def begin_step(self, step: int) -> None:
        """See :class:`Trainable`; reducers learn the scale of its loss."""
        for scaler in [one.holder for one in self.parts.values() if isinstance(one.holder, GradScaler)][:1]:
            for reducer in self.reducers.values():
                reducer.begin_step(step, loss_scale=float(scaler.get_scale()))

    def end_step(self, step: int) -> ReduceStats:
        """See :class:`Trainable`."""
        for one in self.trained:
            one.check_step(step)
        return cost_of_step(self.reducers)

    def close(self) -> None:
        """See :class:`Trainable`."""
        self._stack.close()

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
    def engines(self) -> list[TrainedEngine]:
        """The DeepSpeed engines among the models."""
        return [one for one in self.trained if isinstance(one, TrainedEngine)]

    def like(self) -> State | None:
        """See :class:`Trainable`; the state as it is now, which takes optimizer state that is not there for missing."""
        sharded = [one for one in self.trained if one.is_sharded]
        if not sharded:
            return None
        fresh = [one.optimizer for one in sharded if one.optimizer is not None and not one.optimizer.state]
        running = self._collected().replicated
        for optimizer in fresh:
            optimizer.state.clear()  # torch has let it make a step of zeros, to have something to show
        return running

    def collect(self, step: int) -> Collected:
        """See :class:`Trainable`. Collective if there are buffers or DeepSpeed engines.

        Raises:
            SessionError: see :meth:`Trained.check_unchanged`.
        """
        for one in self.trained:
            one.check_unchanged()
        return self._collected()

    def _collected(self) -> Collected:
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
        """See :class:`Trainable`."""
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
