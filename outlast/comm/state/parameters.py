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
from outlast.errors import CommError, CommStateMismatch

VERSION = 2
_FIX = "it belongs to another model, or to other [comm] settings"

_METHOD = ("compressor", "feedback", "density", "values", "rank", "block", "transport")

Expected = dict[str, tuple[Shape, torch.dtype]]


@dataclass(slots=True, eq=False)
class ParamState:
    """One parameter, or this rank's slice of it, and its slots."""

    name: str
    param: Tensor
    may_compress: bool
    """Whether it is compressed if anything is: a matrix that is large enough."""
    compress: bool
    """Whether it is compressed outside warm-up; if not it has no slots."""
    shape: Shape
    """Of what this rank exchanges: the parameter's, or with transport = hierarchical a slice's."""
    units: int
    """In how many slices it is compressed, each by itself: one, or in the two-phase transport one for each rank."""
    rank: int
    """Which slice this rank owns in the two-phase transport."""
    local: Slots | None = None
    """This rank's slots; None until the first gradient. The compressor's memory is apart for each slice."""
    replicated: Slots | None = None
    owned: Slots | None = None
    moments: Slots | None = None
    """The direction's slots: of this rank's gradients where they are compressed, else of the mean, on every rank."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it is summed and its slots are kept: float64 for itself, float32 for all else."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    def start(self, feedback: Feedback, g: Tensor) -> None:
        """Make the local slots from the first gradient."""
        self.local = join(feedback, [feedback.start(part) for part in slices(g, self.units)])

    def of_slice(self, feedback: Feedback, index: int) -> Slots:
        """The local slots of one slice, as views."""
        assert self.local is not None
        return unit(feedback, self.local, index, self.units)

    def aggregate(self, feedback: Feedback) -> Slots:
        """The replicated slots, made when they are first needed."""
        if self.replicated is None:
            self.replicated = feedback.new_replicated(self._zeros(self.shape))
        return self.replicated

    def held(self, feedback: Feedback) -> Slots:
        """The slots of the slice that this rank owns, made when they are first needed."""
        if self.owned is None:
            self.owned = feedback.new_owned(self._zeros(slice_shape(self.shape, self.rank, self.units)))
        return self.owned

    def direct(self, direction: Direction, g: Tensor) -> Tensor:
        """The direction of ``g``, in this thread's scratch: valid until the next call."""
        if self.moments is None:
            self.moments = direction.start(g)
        out = scratch("direction", g.numel(), g.dtype, g.device).view(g.shape)
        return direction.move(self.moments, g, out)

    def expected(self, feedback: Feedback) -> tuple[Expected, Expected, Expected]:
        """Names, shapes and types of the local, replicated and owned slots."""
        like = torch.zeros(self.shape, dtype=self.dtype)
        local = _forms(join(feedback, [feedback.start(part) for part in slices(like, self.units)]))
        owned: Expected = {}
        if self.units > 1:
            owned = _forms(feedback.new_owned(slices(like, self.units)[self.rank]))
        return local, _forms(feedback.new_replicated(like)), owned

    def _zeros(self, shape: Shape) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.param.device)


class ParameterStates:
    """All parameters, found by identity, with the state that a checkpoint holds.

    Args:
        named_parameters: of the model.
        config: settings.
        feedback: None when nothing is compressed.
        direction: None when gradients themselves are averaged.
        shape_of: what this rank exchanges of a parameter.
        units: slices that are compressed by themselves.
        rank: which of them this rank owns.

    Raises:
        CommError: a name or a parameter that comes twice, or parameters on several devices.
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
                raise CommError(f"parameter {name!r} comes twice", "pass module.named_parameters()")
            may = param.dim() > 1 and param.numel() >= max(config.dense_below, 1)
            state = ParamState(name, param, may, may and feedback is not None, shape_of(param), units, rank)
            self.params[name] = self._by_id[id(param)] = state
        devices = {str(state.param.device) for state in self.params.values()}
        if len(devices) > 1:
            raise CommError(
                f"parameters lie on several devices: {', '.join(sorted(devices))}", "use one device per rank"
            )

    def adopt(self, config: CommConfig, feedback: Feedback | None, direction: Direction | None, units: int) -> None:
        """Compress differently from now on; what was dense so far starts anew, the moments it needs are kept."""
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
        """Where the parameters lie."""
        return next((state.param.device for state in self.params.values()), torch.device("cpu"))

    def of(self, param: Tensor) -> ParamState:
        """The state of a parameter.

        Raises:
            CommError: the reducer was made without it.
        """
        state = self._by_id.get(id(param))
        if state is None:
            raise CommError(
                f"a gradient of shape {tuple(param.shape)} belongs to none of the {len(self.params)} parameters",
                "make the reducer with the named_parameters() of the module that is trained, once it is complete",
            )
        return state

    def state_dict(self, step: int, world_size: int) -> dict[str, dict[str, Any]]:
        """Live tensors; nothing is copied."""
        local: dict[str, dict[str, Tensor]] = {}
        replicated: dict[str, dict[str, Tensor]] = {}
        for name, state in self.params.items():
            if state.local:
                local[name] = dict(state.local)
            if state.owned:
                local[name] = local.get(name, {}) | {_owned(slot): tensor for slot, tensor in state.owned.items()}
            if state.replicated:
                replicated[name] = dict(state.replicated)
            if state.moments:
                part = local if state.compress else replicated
                part[name] = part.get(name, {}) | {_moment(slot): tensor for slot, tensor in state.moments.items()}
        return {"local": local, "replicated": replicated, "meta": self._meta(step, world_size)}

    def load_state_dict(self, saved: Mapping[str, Mapping[str, Any]], world_size: int) -> int:
        """Copy the state in, all of it or (on an error) none; returns the step it was saved after.

        Raises:
            CommStateMismatch: names the setting, parameter, slot, shape or type that does not fit.
        """
        meta, feedback = saved["meta"], self.feedback
        expected = self._meta(0, world_size)
        for key in ("version", "compressor", "feedback", "target", "transport", "ranks_per_node", "world_size"):
            if feedback is None and key in ("world_size", "transport", "ranks_per_node"):
                continue  # without slots nothing depends on how many ranks there were, or how they talked
            if meta.get(key) != expected[key]:
                raise CommStateMismatch(
                    f"error-feedback state was saved with {key} = {meta.get(key)!r}, this run has {expected[key]!r}",
                    f"continue with {key} = {meta.get(key)!r}, or start a new run",
                )
        step = int(meta["step"])
        self._no_strangers(saved)
        found = {name: self._read_all(state, saved, step) for name, state in self.params.items()}
        for name, state in self.params.items():
            state.local, state.replicated, state.owned, state.moments = found[name]
        return step

    def resharded(
        self,
        read: Callable[[int], Mapping[str, Mapping[str, Any]]],
        n: int,
        m: int,
        rank: int,
        feedback: Feedback | None,
    ) -> dict[str, dict[str, Any]]:
        """The state of rank ``rank`` of ``m`` from those of ``n`` ranks, as :meth:`load_state_dict` takes it.

        Args:
            read: an old rank's state dict.
            n: old number of ranks.
            m: new number of ranks, this job's.
            rank: this one.
            feedback: the method as made from settings, before ``of_rank``.

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
        return {"local": dict(local), "replicated": dict(first["replicated"]), "meta": meta}

    def _layout(self, state: ParamState, ranks: int) -> Layout:
        if two_phase(self._config, ranks):
            return in_rows(state.shape, ranks, state.dtype)
        return in_one(state.shape, state.dtype)

    def _read_all(
        self, state: ParamState, saved: Mapping[str, Mapping[str, Any]], step: int
    ) -> tuple[Slots | None, Slots | None, Slots | None, Slots | None]:
        """(local, replicated, owned, moments) of one parameter."""
        local: Expected = {}
        replicated: Expected = {}
        owned: Expected = {}
        moments: Expected = {}
        if self.feedback is not None and state.compress:
            local, replicated, owned = state.expected(self.feedback)
        if self.direction is not None:
            moments = _forms(self.direction.start(torch.zeros(state.shape, dtype=state.dtype)))
        relayed = {_owned(slot): form for slot, form in owned.items()}
        directed = {_moment(slot): form for slot, form in moments.items()}
        required = bool(step) and state.param.requires_grad
        mine = saved["local"].get(state.name)
        if mine is not None and not any(slot in mine for slot in relayed):
            relayed = {}  # saved before the first relay
        of_rank = local | relayed | (directed if state.compress else {})
        of_all = replicated | ({} if state.compress else directed)
        read = self._read(state, mine, "local", of_rank, required) or {}
        read |= self._read(state, saved["replicated"].get(state.name), "replicated", of_all, required) or {}

        def taken(slots: Iterable[str], rename: Callable[[str], str] = str) -> Slots | None:
            held = {slot: read[rename(slot)] for slot in slots if rename(slot) in read}
            return held or None

        mine = taken(local)
        if mine is None and read and state.compress and not local:
            mine = {}
        return mine, taken(replicated), taken(owned, _owned), taken(moments, _moment)

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

    def _no_strangers(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        for part in ("local", "replicated"):
            for name in saved[part]:
                state = self.params.get(name)
                if state is None or not (state.compress or self.direction is not None):
                    raise CommStateMismatch(
                        f"{part} error-feedback state of {name!r}: no such compressed parameter", _FIX
                    )

    def _read(
        self, state: ParamState, slots: Mapping[str, Tensor] | None, part: str, expected: Expected, required: bool
    ) -> Slots | None:
        """Copies of one parameter's slots; None where there are none, and none are due."""
        name = state.name
        if slots is None:
            # Before the first step there is no state; a frozen parameter never gets any.
            if required and expected:
                raise CommStateMismatch(f"{part} error-feedback state of {name!r} is missing", _FIX)
            return None
        if set(slots) != set(expected):
            raise CommStateMismatch(
                f"{part} error-feedback state of {name!r} has {sorted(slots)}, expected {sorted(expected)}", _FIX
            )
        result: Slots = {}
        for slot, (shape, dtype) in expected.items():
            tensor = slots[slot]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CommStateMismatch(
                    f"{part} error-feedback state {slot!r} of {name!r} is {tuple(tensor.shape)} {tensor.dtype}, "
                    f"expected {shape} {dtype}",
                    _FIX,
                )
            result[slot] = tensor.detach().to(state.param.device, copy=True, memory_format=torch.contiguous_format)
        return result


def _forms(slots: Slots) -> Expected:
    return {slot: (tuple(tensor.shape), tensor.dtype) for slot, tensor in slots.items()}


def _owned(slot: str) -> str:
    return f"owned_{slot}"


def _moment(slot: str) -> str:
    return f"adam_{slot}"
