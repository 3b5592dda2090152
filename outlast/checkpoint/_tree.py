"""The state to save, laid out: which groups with which attributes, which tensors at which path."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from outlast.checkpoint._dtypes import check_storable
from outlast.checkpoint._json import to_json
from outlast.checkpoint._names import encode_key
from outlast.errors import CheckpointError, StateMismatch

HEADER = "outlast"
"""The root group's attribute that tells what the checkpoint is; no key of the state may have its name."""


@dataclass(frozen=True)
class Item:
    """One tensor of the state."""

    path: str
    """Its array's path relative to the step."""
    name: str
    """As the user knows it: keys joined by ``/``."""
    tensor: torch.Tensor
    eager: bool


@dataclass
class Plan:
    """All of one rank's state."""

    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Attributes (JSON) by the group's path relative to the step; the root is ``""``."""
    items: list[Item] = field(default_factory=list)


def lay_out(plan: Plan, state: Mapping[str, Any], prefix: str, eager: Collection[str]) -> None:
    """Add a nested state to a plan, under the group ``prefix``.

    A dictionary at the top, and one that holds a tensor somewhere, becomes a group; every other value becomes an
    attribute of the group it stands in.

    Raises:
        CheckpointError: a key or value that cannot be stored, or a tensor's dtype; names it.
    """
    _group(plan, state, prefix, prefix, top=True, eager=False, eager_keys=eager)


def _group(
    plan: Plan, state: Mapping[str, Any], path: str, name: str, *, top: bool, eager: bool, eager_keys: Collection[str]
) -> None:
    attributes: dict[str, Any] = {}
    plan.groups[path] = attributes
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"the state at {name or 'the top'!r} has the key {key!r}", "keys must be strings")
        child_name = f"{name}/{key}" if name else key
        child_eager = eager or (top and key in eager_keys)
        is_group = isinstance(value, Mapping) and (top or _holds_tensor(value))
        if not is_group and not isinstance(value, torch.Tensor):
            if not path and key == HEADER:
                raise CheckpointError(f"{HEADER!r} is a reserved key of the replicated state", "use another key")
            attributes[key] = to_json(value, child_name)
            continue
        component = encode_key(key, at_root=not path)
        child = f"{path}/{component}" if path else component
        if is_group:
            _group(plan, value, child, child_name, top=False, eager=child_eager, eager_keys=())
        else:
            check_storable(value, child_name)
            plan.items.append(Item(child, child_name, value.detach(), child_eager))


def _holds_tensor(value: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(item, torch.Tensor) or (isinstance(item, Mapping) and _holds_tensor(item)) for item in value.values()
    )


def check_like(saved: Mapping[str, Any], running: Mapping[str, Any]) -> None:
    """Check that a restored state has the running one's tensors; values that are no tensors are not compared.

    Args:
        saved: nested, as :meth:`Checkpointer.restore` returned it.
        running: nested, e.g. ``{"model": model.state_dict()}``; tensors may be on any device, or meta.

    Raises:
        StateMismatch: names the tensors that are missing, unexpected, or of another shape or dtype, with both.
    """
    have, want = dict(_tensors(saved, "")), dict(_tensors(running, ""))
    problems = [f"{name}: in the running state, not in the checkpoint" for name in want if name not in have]
    problems += [f"{name}: in the checkpoint, not in the running state" for name in have if name not in want]
    for name in want.keys() & have.keys():
        a, b = have[name], want[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            problems.append(
                f"{name}: {tuple(a.shape)} {a.dtype} in the checkpoint, {tuple(b.shape)} {b.dtype} in the running state"
            )
    if problems:
        shown = sorted(problems)[:10]
        more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise StateMismatch(
            f"{len(problems)} tensors of the checkpoint do not fit:\n  " + "\n  ".join(shown) + more,
            "run with the settings the checkpoint was made with, or start another run",
        )


def _tensors(state: Mapping[str, Any], prefix: str) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    for key, value in state.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, torch.Tensor):
            found.append((name, value))
        elif isinstance(value, Mapping):
            found += _tensors(value, name)
    return found
