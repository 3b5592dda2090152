"""What a refused restore says: which tensors differ, which case that looks like, and the argument that helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from outlast.errors import StateMismatch

if TYPE_CHECKING:
    from outlast.checkpoint.state.matching import Mismatch, TensorType
    from outlast.checkpoint.state.selection import Selection

_SHOWN = 10
_TRIED = 8
"""Unexpected tensors for which another name is looked for."""
_OTHERWISE = "run with the settings that the checkpoint was saved with, or start another run"
_MAKE_IT = "torch.distributed.checkpoint.state_dict.get_state_dict makes it"


def mismatch_error(
    mismatches: Sequence[Mismatch],
    saved: Mapping[str, TensorType],
    running: Mapping[str, TensorType],
    selection: Selection | None = None,
) -> StateMismatch:
    """The error for what differs.

    Args:
        mismatches: at least one.
        saved: the step's tensors, by name.
        running: the running state's, by name.
        selection: the restore's arguments; None: the comparison has none that could help.
    """
    lines = sorted(map(str, mismatches))
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    what = f"{len(lines)} tensors of the checkpoint do not match the running state:\n  " + "\n  ".join(lines[:_SHOWN])
    advice = _OTHERWISE if selection is None else _advice(mismatches, saved, running)
    return StateMismatch(what + more, advice)


def _advice(mismatches: Sequence[Mismatch], saved: Mapping[str, TensorType], running: Mapping[str, TensorType]) -> str:
    of_kind: dict[str, list[str]] = {kind: [] for kind in ("missing", "unexpected", "shape", "dtype")}
    for mismatch in mismatches:
        of_kind[mismatch.kind].append(mismatch.name)
    for recognise in (_other_types, _other_parts, _no_optimizer_state, _other_prefix):
        advice = recognise(of_kind, saved, running)
        if advice:
            return advice
    fit = len(running) - len(of_kind["missing"] + of_kind["shape"] + of_kind["dtype"])
    if fit <= 0:
        return _OTHERWISE
    return (
        f"to take the {fit} tensors that fit and leave the others as they are (a new head, say), pass strict=False: "
        "what was not taken is in `not_taken` then; or run with the settings that the checkpoint was saved with"
    )


def _other_types(of_kind: Mapping[str, list[str]], saved: Mapping[str, TensorType], _: Mapping[str, TensorType]) -> str:
    if not of_kind["dtype"] or of_kind["missing"] or of_kind["unexpected"] or of_kind["shape"]:
        return ""
    return "if these are floating-point numbers of another precision, pass cast=True, which converts them"


def _other_parts(
    of_kind: Mapping[str, list[str]], saved: Mapping[str, TensorType], running: Mapping[str, TensorType]
) -> str:
    ours, theirs = ({name.split("/")[0] for name in names} for names in (running, saved))
    parts = ", ".join(repr(part) for part in sorted(ours & theirs))
    if not parts or of_kind["shape"] or of_kind["dtype"]:
        return ""
    if not of_kind["missing"] and {name.split("/")[0] for name in of_kind["unexpected"]} <= theirs - ours:
        advice = f"to take a part of the checkpoint alone, pass parts=({parts},)"
        if all(map(_optimizer_owner, of_kind["unexpected"])):
            advice += f"; for the optimizer's, its state must be there first: {_MAKE_IT}"
        return advice
    if (
        not of_kind["unexpected"]
        and (only_ours := {name.split("/")[0] for name in of_kind["missing"]}) <= ours - theirs
    ):
        lacks = ", ".join(repr(part) for part in sorted(only_ours))
        return f"the checkpoint has no {lacks}: pass a state without it, or strict=({parts},), which leaves it as it is"
    return ""


def _no_optimizer_state(
    of_kind: Mapping[str, list[str]], saved: Mapping[str, TensorType], running: Mapping[str, TensorType]
) -> str:
    if of_kind["shape"] or of_kind["dtype"] or bool(of_kind["missing"]) == bool(of_kind["unexpected"]):
        return ""
    names, others = (of_kind["missing"], saved) if of_kind["missing"] else (of_kind["unexpected"], running)
    owners = {_optimizer_owner(name) for name in names}
    held = {_optimizer_owner(name) for name in others}
    if "" in owners or owners & held:
        return ""
    part = names[0].split("/")[0]
    rest = ", ".join(repr(key) for key in sorted({name.split("/")[0] for name in saved} - {part}))
    strict = f"strict=({rest},)" if rest else "strict=False"
    if of_kind["missing"]:
        return (
            "an optimizer has no state of a parameter that never had a gradient (frozen, or unused), and these had "
            f"none when the step was saved: pass {strict}, which takes what there is of {part!r}; `not_taken` "
            "names the rest"
        )
    if not any(held):
        return (
            f"the running optimizer has no state yet, which must be there first: {_MAKE_IT}; or restore {part!r} "
            "without `like` and `into`"
        )
    return (
        "the running optimizer has no state of these parameters (frozen, or not yet given a gradient): make it first, "
        f"as {_MAKE_IT}, or pass {strict}, which leaves theirs out"
    )


def _optimizer_owner(name: str) -> str:
    """The optimizer's state that a tensor belongs to, ``optimizer/state/PARAMETER``; empty if it is none."""
    keys = name.split("/")
    return "/".join(keys[:-1]) if len(keys) >= 4 and "state" in keys[1:-2] else ""


def _other_prefix(
    of_kind: Mapping[str, list[str]], saved: Mapping[str, TensorType], running: Mapping[str, TensorType]
) -> str:
    """Whether a different beginning explains the names."""
    missing = set(of_kind["missing"])
    for name in sorted(of_kind["unexpected"])[:_TRIED]:
        for other in sorted(missing):
            if saved[name].shape != running[other].shape:
                continue
            old, new = _beginnings(name, other)
            if not old or not new:
                continue
            begin = [unexpected for unexpected in of_kind["unexpected"] if unexpected.startswith(old)]
            found = [unexpected for unexpected in begin if new + unexpected[len(old) :] in missing]
            if 2 * len(found) > max(len(begin), 1) and (len(found) > 1 or name.split("/")[-1] == other.split("/")[-1]):
                return (
                    f"if {name!r} is {other!r} here, and others likewise, pass rename={{{old!r}: {new!r}}}; "
                    "`rename` also takes a function"
                )
    return ""


def _beginnings(one: str, other: str) -> tuple[str, str]:
    """What differs at the beginning of two names that end alike, up to a ``/`` or ``.``; empty if they do not."""
    end = 0
    while end < min(len(one), len(other)) and one[-1 - end] == other[-1 - end]:
        end += 1
    for at in range(len(one) - end, len(one)):
        if at and one[at - 1] in "/.":
            cut = len(other) - (len(one) - at)
            if cut and other[cut - 1] in "/.":
                return one[:at], other[:cut]
    return "", ""
