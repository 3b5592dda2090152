"""The slots of error-feedback state in a state dict: what they are called, and the one way they are read back.

A state dict has two parts, ``local`` and ``replicated``. In each a parameter has a dict of slots, named ::

    h_i, e, ...    slots of the method and its compressor, under their own names
    owned_s        slot s that the owner of a slice keeps for it
    adam_v         slot v of the direction

The name of a slot that exists once for each slice ends in the slice's number; see :mod:`outlast.comm.feedback.layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from outlast.comm.compressors import Shape, Slots
from outlast.errors import CommStateMismatch

OWNED = "owned_"
MOMENT = "adam_"
PARTS = ("local", "replicated")

_FIX = "it belongs to another model, or to other [comm] settings"
_LESS = (
    "if these parameters were frozen, ignored or thawed since it was saved, strict=False takes the state of the others "
    "and returns these names; otherwise it belongs to another model, or to other [comm] settings"
)
_SHOWN = 10

T = TypeVar("T")
State = Mapping[str, Mapping[str, Any]]
"""A state dict: ``local``, ``replicated`` and ``meta``."""


class Form(NamedTuple):
    """What a slot must be."""

    shape: Shape
    dtype: torch.dtype


Forms = dict[str, Form]


class SlotSchema(NamedTuple):
    """The slots of one parameter on one rank, as they are named in a state dict."""

    device: torch.device
    """Where they are kept."""
    local: Forms
    replicated: Forms
    required: bool
    """Whether they must be there after the first step: not for a parameter without gradients."""
    late: frozenset[str] = frozenset()
    """Local slots that are all missing before an owner relays its slice for the first time."""


def forms_of(slots: Slots) -> Forms:
    """What slots like ``slots`` must be."""
    return {slot: Form(tuple(tensor.shape), tensor.dtype) for slot, tensor in slots.items()}


def prefixed(prefix: str, slots: Mapping[str, T] | None) -> dict[str, T]:
    """``slots`` under the names that they have in a state dict; none for None."""
    return {prefix + slot: value for slot, value in (slots or {}).items()}


class SplitSlots(NamedTuple):
    """One parameter's slots of one part, without prefixes."""

    own: Slots
    """Of the method and its compressor."""
    owned: Slots
    moments: Slots


def split(slots: Slots) -> SplitSlots:
    """The reverse of :func:`prefixed`."""
    result = SplitSlots({}, {}, {})
    for name, tensor in slots.items():
        if name.startswith(OWNED):
            result.owned[name.removeprefix(OWNED)] = tensor
        elif name.startswith(MOMENT):
            result.moments[name.removeprefix(MOMENT)] = tensor
        else:
            result.own[name] = tensor
    return result


def check_meta(
    saved: Mapping[str, Any],
    expected: Mapping[str, Any],
    keys: Iterable[str],
    remedies: Mapping[str, str] | None = None,
) -> None:
    """Compare the ``meta`` of a state with this run's.

    Args:
        saved: of the state.
        expected: of this run.
        keys: which to compare, in this order.
        remedies: by key, what to do where it differs, in place of going on with the saved value.

    Raises:
        CommStateMismatch: names the first of ``keys`` that differs, and both values.
    """
    for key in keys:
        if saved.get(key) != expected[key]:
            raise CommStateMismatch(
                f"error-feedback state was saved with {key} = {saved.get(key)!r}, this run has {expected[key]!r}",
                (remedies or {}).get(key) or f"continue with {key} = {saved.get(key)!r}, or start a new run",
            )


def read_slots(
    state: State, schemas: Mapping[str, SlotSchema], step: int, left: list[str] | None = None
) -> dict[str, tuple[Slots, Slots]]:
    """Copies of every parameter's (local, replicated) slots; empty if there are none and none are required.

    Args:
        state: a state dict.
        schemas: by the parameter's name.
        step: the step after which it was saved; 0 before the first, when there are no slots yet.
        left: gets the names of parameters whose state does not fit, is missing, or belongs to no parameter; those
            begin without any. None: that is an error.

    Raises:
        CommStateMismatch: names the parameter and the slot, shape or type that does not fit.
    """
    unused = frozenset(state["meta"].get("unused", ()))
    schemas = {
        name: schema._replace(required=schema.required and name not in unused) for name, schema in schemas.items()
    }
    for part in PARTS:
        unknown = [
            name for name in state[part] if name not in schemas or not (schemas[name].local or schemas[name].replicated)
        ]
        if left is not None:
            left += [name for name in unknown if name not in left]
        elif unknown:
            raise CommStateMismatch(
                f"{part} error-feedback state of {_listed(unknown)}: no such compressed parameter", _LESS
            )
    if left is None:
        _check_all_there(state, schemas, step)
    read: dict[str, tuple[Slots, Slots]] = {}
    for name, schema in schemas.items():
        try:
            read[name] = (
                _read(name, "local", state["local"].get(name), schema, schema.local, step),
                _read(name, "replicated", state["replicated"].get(name), schema, schema.replicated, step),
            )
        except CommStateMismatch:
            if left is None:
                raise
            read[name] = {}, {}
            left += [name] * (name not in left)
    return read


def _check_all_there(state: State, schemas: Mapping[str, SlotSchema], step: int) -> None:
    for part in PARTS:
        missing = [
            name
            for name, schema in schemas.items()
            if step and schema.required and getattr(schema, part) and name not in state[part]
        ]
        if missing:
            raise CommStateMismatch(f"{part} error-feedback state of {_listed(missing)} is missing", _LESS)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _read(name: str, part: str, slots: Slots | None, schema: SlotSchema, expected: Forms, step: int) -> Slots:
    if slots is None:
        if step and expected and schema.required:
            raise CommStateMismatch(f"{part} error-feedback state of {name!r} is missing", _FIX)
        return {}
    if schema.late.isdisjoint(slots):
        expected = {slot: form for slot, form in expected.items() if slot not in schema.late}
    moments = {slot: form for slot, form in expected.items() if slot.startswith(MOMENT)}
    if set(slots) == set(moments) and not (step and schema.required):
        expected = moments  # taken over from an optimizer, and no gradient since
    if set(slots) != set(expected):
        raise CommStateMismatch(
            f"{part} error-feedback state of {name!r} has {sorted(slots)}, expected {sorted(expected)}", _FIX
        )
    copies: Slots = {}
    for slot, form in expected.items():
        tensor = slots[slot]
        if (tuple(tensor.shape), tensor.dtype) != form:
            raise CommStateMismatch(
                f"{part} error-feedback state {slot!r} of {name!r} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {form.shape} {form.dtype}",
                _FIX,
            )
        copies[slot] = tensor.detach().to(schema.device, copy=True, memory_format=torch.contiguous_format)
    return copies
