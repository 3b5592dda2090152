"""Error-feedback state of every parameter, by the parameter's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Shape, Slots
from outlast.comm.config import CommConfig, two_phase
from outlast.comm.direction import Direction
from outlast.comm.feedback import Feedback
from outlast.comm.feedback.layout import join, unit
from outlast.comm.slices import slice_shape, slices
from outlast.comm.state.reshard import Layout, in_one, in_rows, reshard
from outlast.comm.state.slots import (
    MOMENT,
    OWNED,
    Forms,
    SlotSchema,
    State,
    check_meta,
    forms_of,
    prefixed,
    read_slots,
    split,
)
from outlast.errors import CommError, CommStateMismatch

VERSION = 2

_RESHARD = (
    "redistribute it: reducer.load_resharded(read, ranks), where ranks saved it, and read(rank) returns what rank's "
    "state_dict() was, with outlast.checkpoint restored.read_local(rank)"
)
_METHOD = ("compressor", "feedback", "density", "values", "rank", "block", "transport")


@dataclass(slots=True, eq=False)
class ParamState:
    """One parameter, or this rank's slice of it, and its slots."""

    name: str
    param: Tensor
    may_compress: bool
    """Whether it is compressed if anything is: it is a matrix, and large enough."""
    compress: bool
    """Whether it is compressed outside warm-up; if not it has no slots."""
    shape: Shape
    """Of what this rank exchanges: the parameter, or with ``ranks_per_node`` a slice of it."""
    units: int
    """In how many slices it is compressed separately: one, or in the two-phase transport one for each rank."""
    rank: int
    """Which slice this rank owns in the two-phase transport."""
    local: Slots | None = None
    """This rank's slots; None until the first gradient. Each slice has its own compressor memory."""
    replicated: Slots | None = None
    owned: Slots | None = None
    moments: Slots | None = None
    """The direction's slots: of this rank's gradients if they are compressed, else of the mean, on every rank."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it is summed and its slots are kept: float64 for float64, float32 for all else."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    def start(self, feedback: Feedback, g: Tensor) -> None:
        """Make the local slots from the first gradient."""
        self.local = join(feedback, [feedback.start(part) for part in slices(g, self.units)])

    def unit(self, feedback: Feedback, index: int) -> Slots:
        """The local slots of one slice, as views."""
        assert self.local is not None
        return unit(feedback, self.local, index, self.units)

    def aggregate(self, feedback: Feedback) -> Slots:
        """The replicated slots, made when they are first needed."""
        if self.replicated is None:
            self.replicated = feedback.new_replicated(self._zeros(self.shape))
        return self.replicated

    def owner_slots(self, feedback: Feedback) -> Slots:
        """The slots of the slice that this rank owns, made when they are first needed."""
        if self.owned is None:
            self.owned = feedback.new_owned(self._zeros(slice_shape(self.shape, self.rank, self.units)))
        return self.owned

    def direction_of(self, direction: Direction, g: Tensor) -> Tensor:
        """The direction of ``g``, in this thread's scratch: valid until the next call."""
        if self.moments is None:
            self.moments = direction.start(g)
        out = scratch("direction", g.numel(), g.dtype, g.device).view(g.shape)
        return direction.move(self.moments, g, out)

    def saved(self) -> tuple[Slots, Slots]:
        """Its (local, replicated) slots, live, as a state dict names them."""
        local = dict(self.local or {}) | prefixed(OWNED, self.owned)
        replicated, moments = dict(self.replicated or {}), prefixed(MOMENT, self.moments)
        return (local | moments, replicated) if self.compress else (local, replicated | moments)

    def load(self, local: Slots, replicated: Slots) -> None:
        """Adopt slots that fit :meth:`schema`."""
        own, owned, moments = split(local)
        aggregate, _, moments_of_mean = split(replicated)
        # Moments alone are of an optimizer that was taken over, before the first gradient.
        started = self.compress and bool(own or owned or aggregate)
        self.local = own if own or started else None
        self.replicated = aggregate or None
        self.owned = owned or None
        self.moments = moments or moments_of_mean or None

    def schema(self, feedback: Feedback | None, direction: Direction | None) -> SlotSchema:
        """What its slots must be. Before the first step it has none; a frozen parameter never gets any."""
        like = torch.zeros(self.shape, dtype=self.dtype)
        local: Forms = {}
        replicated: Forms = {}
        owned: Forms = {}
        if feedback is not None and self.compress:
            local = forms_of(join(feedback, [feedback.start(part) for part in slices(like, self.units)]))
            replicated = forms_of(feedback.new_replicated(like))
            if self.units > 1:
                owned = prefixed(OWNED, forms_of(feedback.new_owned(slices(like, self.units)[self.rank])))
        if direction is not None:
            part = local if self.compress else replicated
            part |= prefixed(MOMENT, forms_of(direction.start(like)))
        return SlotSchema(
            self.param.device,
            local=local | owned,
            replicated=replicated,
            required=self.param.requires_grad,
            late=frozenset(owned),
        )

    def _zeros(self, shape: Shape) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.param.device)


class ParameterStates:
    """All parameters, looked up by identity, with the state that a checkpoint holds.

    Args:
        named_parameters: of the model.
        config: settings.
        feedback: None when nothing is compressed.
        direction: None when gradients themselves are averaged.
        shape_of: what this rank exchanges of a parameter.
        units: in how many slices a tensor is compressed separately.
        rank: which of them this rank owns.

    Raises:
        CommError: a duplicate name or parameter, or parameters on several devices.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        config: CommConfig,
        feedback: Feedback | None,
        direction: Direction | None = None,
        *,
        shape_of: Callable[[Tensor], Shape] = lambda param: tuple(param.shape),
        units: int = 1,
        rank: int = 0,
    ) -> None:
        self.feedback = feedback
        self.direction = direction
        self._config = config
        self.params: dict[str, ParamState] = {}
        self._by_id: dict[int, ParamState] = {}
        for name, param in named_parameters:
            if name in self.params or id(param) in self._by_id:
                raise CommError(f"parameter {name!r} is given twice", "pass module.named_parameters()")
            may = param.dim() > 1 and param.numel() >= max(config.dense_below, 1)
            state = ParamState(name, param, may, may and feedback is not None, shape_of(param), units, rank)
            self.params[name] = self._by_id[id(param)] = state
        devices = {str(state.param.device) for state in self.params.values()}
        if len(devices) > 1:
            raise CommError(
                f"parameters are on several devices: {', '.join(sorted(devices))}", "use one device per rank"
            )

    def adopt(self, config: CommConfig, feedback: Feedback | None, direction: Direction | None, units: int) -> None:
        """Change the method. Error feedback starts afresh; the moments that the new direction has too are kept."""
        self._config, self.feedback, self.direction = config, feedback, direction
        for state in self.params.values():
            state.compress = state.may_compress and feedback is not None
            state.units = units
            state.local = state.replicated = state.owned = None
            if direction is not None and state.moments is not None:
                fresh = direction.start(torch.zeros(state.shape, dtype=state.dtype, device=state.param.device))
                state.moments = fresh | {slot: t for slot, t in state.moments.items() if slot in fresh}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((state.param.device for state in self.params.values()), torch.device("cpu"))

    def knows(self, param: Tensor) -> bool:
        """Whether it is one of them."""
        return id(param) in self._by_id

    def of(self, param: Tensor) -> ParamState:
        """The state of a parameter.

        Raises:
            CommError: the reducer does not know the parameter.
        """
        state = self._by_id.get(id(param))
        if state is None:
            raise CommError(
                f"a gradient of shape {tuple(param.shape)} belongs to none of the {len(self.params)} parameters",
                "make the reducer with the named_parameters() of the trained module, once it is complete",
            )
        return state

    def state_dict(self, step: int, world_size: int) -> dict[str, dict[str, Any]]:
        """Live tensors; nothing is copied."""
        local: dict[str, Slots] = {}
        replicated: dict[str, Slots] = {}
        for name, param in self.params.items():
            for part, slots in zip((local, replicated), param.saved(), strict=True):
                if slots:
                    part[name] = slots
        unused = [
            name for name, param in self.params.items() if step and param.compress and param.local is None
        ]  # no rank has used them yet: that they have no slots is no loss
        return {"local": local, "replicated": replicated, "meta": {**self._meta(step, world_size), "unused": unused}}

    def load_state_dict(self, state: State, world_size: int, left: list[str] | None = None) -> int:
        """Copy the state in, all of it or (on an error) none; returns the step it was saved after.

        Args:
            state: a state dict.
            world_size: ranks that exchange.
            left: see :func:`read_slots`.

        Raises:
            CommStateMismatch: names the setting, parameter, slot, shape or type that does not fit.
        """
        keys = ["version", "compressor", "feedback", "target"]
        if self.feedback is not None:  # without slots, the ranks and the transport do not matter
            keys += ["world_size", "transport", "ranks_per_node"]  # what "auto" stands for depends on the world size
        check_meta(state["meta"], self._meta(0, world_size), keys, {"world_size": _RESHARD})
        step = int(state["meta"]["step"])
        schemas = {name: param.schema(self.feedback, self.direction) for name, param in self.params.items()}
        for name, (local, replicated) in read_slots(state, schemas, step, left).items():
            self.params[name].load(local, replicated)
        return step

    def resharded(
        self,
        read: Callable[[int], State],
        n: int,
        m: int,
        rank: int,
        feedback: Feedback | None,
    ) -> dict[str, dict[str, Any]]:
        """The state of rank ``rank`` of ``m`` from those of ``n`` ranks, as :meth:`load_state_dict` takes it.

        Args:
            read: an old rank's state dict.
            n: the world size that saved.
            m: this job's world size.
            rank: of this process.
            feedback: the method, not bound to a rank.

        Raises:
            CommStateMismatch: state that depends on nodes, or slots that are missing.
        """
        first = read(0)
        meta = dict(first["meta"])
        if meta.get("ranks_per_node", 1) != 1 or self._config.ranks_per_node != 1:
            raise CommStateMismatch(
                f"error-feedback state of {n} ranks with ranks_per_node = {meta.get('ranks_per_node')} cannot be "
                f"redistributed over {m} ranks",
                f"continue with {n} ranks, or start a new run",
            )
        local: Mapping[str, Slots] = {}
        if feedback is not None:
            layouts = {}
            for name in first["local"]:
                if name in self.params:
                    state = self.params[name]
                    layouts[name] = (self._layout(state, n), self._layout(state, m))
            local = reshard(
                layouts, lambda old: read(old)["local"], n, m, rank, feedback, replicated=first["replicated"]
            )
        meta["world_size"] = m
        # What belongs to no parameter is refused, or named, by load_state_dict.
        strange = {name: slots for name, slots in first["local"].items() if name not in self.params}
        return {"local": {**local, **strange}, "replicated": dict(first["replicated"]), "meta": meta}

    def _layout(self, state: ParamState, ranks: int) -> Layout:
        if two_phase(self._config, ranks):
            return in_rows(state.shape, ranks, state.dtype)
        return in_one(state.shape, state.dtype)

    def _meta(self, step: int, world_size: int) -> dict[str, Any]:
        return {
            "version": VERSION,
            "compressor": self._config.compressor,
            "feedback": self._config.feedback if self.feedback else "none",
            "target": self._config.target,
            "transport": self._config.transport,
            "ranks_per_node": self._config.ranks_per_node,
            "world_size": world_size,
            "method": {key: getattr(self._config, key) for key in _METHOD},
            "step": step,
        }
