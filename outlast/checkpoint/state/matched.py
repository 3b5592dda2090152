"""What is taken of a step, as its reader sees it: by the paths in the step, whatever the running state calls it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from outlast.checkpoint.format.names import readable
from outlast.checkpoint.format.zarr import ArrayInfo
from outlast.checkpoint.state.boxes import Box
from outlast.checkpoint.state.matching import Matching, Mismatch, Types, match, match_new_names
from outlast.checkpoint.state.selection import Selection, keys_of
from outlast.checkpoint.state.target import RestoreTarget
from outlast.checkpoint.state.tree import child_path
from outlast.errors import StateMismatch

LEFT_OUT = object()
"""In the place of a tensor that is not taken."""


class Matched:
    """The tensors of a step that a restore takes.

    Args:
        types: of the step's tensors, by path; those of parts that are not taken may be missing.
        target: the running state's tensors; None: there is none, and tensors are read whole.
        selection: what may differ.

    Attributes:
        boxes: the parts to read of tensors that are not read whole, by path.
        not_taken: see :class:`Matching`.

    Raises:
        StateMismatch: see :func:`match`.
    """

    def __init__(self, types: Types, target: RestoreTarget | None, selection: Selection) -> None:
        self._target = target
        self._cast = selection.cast
        self._matching: Matching
        if target is None:
            self._matching = match_new_names(types, selection)
        else:
            running = {path: of for path, of in target.types.items() if selection.takes_part(path)}
            self._matching = match(types, running, {path: target.names[path] for path in running}, selection)
        self._taken = self._matching.taken
        self.not_taken: tuple[Mismatch, ...] = self._matching.not_taken
        boxes = target.boxes if target is not None else {}
        self.boxes: dict[str, Box] = {old: boxes[new] for old, new in self._taken.items() if new in boxes}
        self._wrappers: dict[str, str] = {}

    @property
    def left_out(self) -> frozenset[str]:
        """Paths of the tensors that are not taken."""
        return self._matching.left_out

    @property
    def is_as_saved(self) -> bool:
        """Whether all tensors keep their names, and none is left out."""
        return not self.left_out and not self.not_taken and all(old == new for old, new in self._taken.items())

    def takes(self, path: str, info: ArrayInfo | None = None) -> bool:
        """Whether a tensor is taken, or (with its document) any of those in a pack."""
        if info is not None and info.packed is not None:
            return any(tensor in self._taken for tensor in info.packed)
        return path in self._taken

    def memory(self, path: str) -> torch.Tensor | None:
        """The running job's memory for what is read of a tensor; None: there is none."""
        return self._target.target(self._taken[path]) if self._target is not None and path in self._taken else None

    def dtype(self, path: str, saved: torch.dtype) -> torch.dtype:
        """The type that a tensor is to have."""
        if self._target is not None:
            return self._target.types[self._taken[path]].dtype
        return self._cast if isinstance(self._cast, torch.dtype) and saved.is_floating_point else saved

    def converted(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """What was read, in the type that it is to have.

        Raises:
            StateMismatch: a finite element is not finite in that type.
        """
        dtype = self.dtype(path, tensor.dtype)
        if dtype == tensor.dtype:
            return tensor
        converted = tensor.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
            wide = torch.complex64 if dtype.is_complex else torch.float32
            before = tensor.to(wide) if tensor.itemsize < 4 else tensor
            lost = before.isfinite() & ~converted.to(wide).isfinite()
            if lost.any():
                raise StateMismatch(
                    f"{readable(path)!r} has elements that {dtype} cannot hold, {before[lost][0].item()} for example",
                    f"take it as it was saved, {tensor.dtype}, or in a type of the same range",
                )
        return converted

    def placed(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """See :meth:`RestoreTarget.placed`."""
        return tensor if self._target is None else self._target.placed(self._taken[path], tensor)

    def check_wrappers(self, shapes: Mapping[str, dict[str, Any]]) -> None:
        """See :meth:`RestoreTarget.check_wrappers`."""
        if self._target is not None:
            self._wrappers = self._target.check_wrappers(shapes, self._taken)

    def wrapper(self, path: str, shape: dict[str, Any], inner: dict[Any, Any]) -> Any:
        """The wrapper that a group becomes; None: it becomes what its shape says."""
        if self._target is None or path not in self._wrappers:
            return None
        return self._target.wrapper(self._wrappers[path], shape, inner)

    def arrange(self, state: MutableMapping[Any, Any], odd_keys: Mapping[str, Any]) -> None:
        """Move what has a new name to its place, and remove :data:`LEFT_OUT`, in a state as it was saved.

        A dictionary that loses all its tensors is removed with the values in it. Values go where the tensors beside
        them go. A list or tuple has None in the place of what it loses.

        Args:
            state: nested.
            odd_keys: the keys whose components do not tell them.
        """
        if self.is_as_saved:
            return
        moves = {old: new for old, new in self._taken.items() if old != new}
        beside = {old.rpartition("/")[0]: new.rpartition("/")[0] for old, new in moves.items()}
        stayed = {old.rpartition("/")[0] for old in self._taken if old not in moves}
        for old in beside.keys() & stayed:
            del beside[old]  # some tensors are still there: values stay with them
        moves |= _container_moves(self._taken)
        moved: list[tuple[str, Any]] = []
        _walk(state, "", moves, {old: new for old, new in beside.items() if old != new}, moved)
        for path, value in moved:
            _insert(state, path, value, odd_keys)


def _container_moves(taken: Mapping[str, str]) -> dict[str, str]:
    """Old and new paths of the containers that move as they are: with all tensors that are below either."""
    below_old, below_new, below_both = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    for old, new in taken.items():
        below_old.update(_above(old))
        below_new.update(_above(new))
        for pair in zip(_above(old), _above(new), strict=False):
            if old[len(pair[0]) :] != new[len(pair[1]) :]:
                break
            below_both[pair] += 1
    return {
        old: new for (old, new), count in below_both.items() if old != new and count == below_old[old] == below_new[new]
    }


def _above(path: str) -> list[str]:
    """The paths of the containers around a tensor, innermost first, without the state itself."""
    found = []
    while path := path.rpartition("/")[0]:
        found.append(path)
    return found


def _walk(
    state: MutableMapping[Any, Any],
    path: str,
    moves: Mapping[str, str],
    beside: Mapping[str, str],
    moved: list[tuple[str, Any]],
) -> tuple[bool, bool]:
    """Take what is left out or moved out of a dictionary; whether it lost a tensor, and whether it has one now."""
    lost = has = False
    for key in list(state):
        value, below = state[key], child_path(path, key)
        if value is LEFT_OUT:
            del state[key]
            lost = True
        elif below in moves:
            if isinstance(value, MutableMapping):
                _walk(value, below, {}, {}, moved)
            elif _has_tensor(value) and not isinstance(value, torch.Tensor):
                value = _walk_items(value, below, {}, {}, moved)[2]
            moved.append((moves[below], value))
            del state[key]
            lost = True
        elif isinstance(value, MutableMapping):
            lost_there, has_there = _walk(value, below, moves, beside, moved)
            if lost_there and not has_there and (path or not value):
                del state[key]
            lost, has = lost or lost_there, has or has_there
        elif isinstance(value, torch.Tensor):
            has = True
        elif _has_tensor(value):
            lost_there, has_there, state[key] = _walk_items(value, below, moves, beside, moved)
            lost, has = lost or lost_there, has or has_there
        elif path in beside:
            moved.append((child_path(beside[path], key), state.pop(key)))
    return lost, has


def _has_tensor(value: Any) -> bool:
    """Whether a value is a tensor, one that is left out, or a container with one."""
    if value is LEFT_OUT or isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    return isinstance(value, list | tuple | deque) and any(map(_has_tensor, value))


def _walk_items(
    items: Any,
    path: str,
    moves: Mapping[str, str],
    beside: Mapping[str, str],
    moved: list[tuple[str, Any]],
) -> tuple[bool, bool, Any]:
    """As :func:`_walk`, of a list, tuple, named tuple or deque; also what becomes of it."""
    numbered = dict(zip(getattr(type(items), "_fields", range(len(items))), items, strict=True))
    left = dict(numbered)
    lost, has = _walk(left, path, moves, beside, moved)
    values = [left.get(key) for key in numbered]
    if isinstance(items, tuple):
        return lost, has, tuple.__new__(type(items), values)
    return lost, has, type(items)(values) if isinstance(items, list) else deque(values, items.maxlen)


def _insert(state: MutableMapping[Any, Any], path: str, value: Any, odd_keys: Mapping[str, Any]) -> None:
    *above, last = [odd_keys.get(component, key) for component, key in zip(path.split("/"), keys_of(path), strict=True)]
    node: Any = state
    for key in above:
        node = node.setdefault(key, {}) if isinstance(node, MutableMapping) else None
    if not isinstance(node, MutableMapping):
        raise StateMismatch(
            f"{readable(path)!r} lies in something that is no dictionary", "give it another name in `rename`"
        )
    if isinstance(value, MutableMapping) and isinstance(there := node.get(last), Mapping):
        value.update({key: item for key, item in there.items() if key not in value})
    node[last] = value
