"""The groups of a step, put together again: values and tensors in the containers that were saved, in their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from outlast.checkpoint.format.json_values import UnknownKind, from_json, key_text
from outlast.checkpoint.format.kinds import CannotStore
from outlast.checkpoint.format.names import CONTAINER, HEADER, decode_key
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.format.zarr import node_path
from outlast.checkpoint.state.containers import close_container
from outlast.checkpoint.state.keys import attribute_name, component, is_plain
from outlast.checkpoint.state.wrappers import WRAPPER
from outlast.errors import (
    CheckpointError,
    CorruptCheckpoint,
    IncompleteCheckpoint,
    StateMismatch,
    UnknownFormatVersion,
)

_MALFORMED = (AttributeError, LookupError, OverflowError, RecursionError, RuntimeError, TypeError, ValueError)
"""What JSON that :func:`to_json` did not write can raise when it is read."""


class Groups:
    """The groups of a state, by path relative to the step; the constructor reads their values.

    Args:
        attributes: of each group, as they are stored.
        top: path of the state's own group.
        parts: keys of that group to take; None: all.
        stand_ins: for objects of classes that are not loaded, give stand-ins.

    Raises:
        Fault: a group's attributes are malformed, or of a later version.
        StateMismatch: a value needs a class that this program has not imported, or that has changed.
    """

    def __init__(
        self,
        attributes: Mapping[str, dict[str, Any]],
        top: str,
        *,
        parts: Collection[str] | None = None,
        stand_ins: bool,
    ) -> None:
        self._top = top
        self._parts = parts
        self._stand_ins = stand_ins
        self._values: dict[str, dict[str, Any]] = {}
        self._keys: dict[str, Sequence[Any] | None] = {}
        self.shapes: dict[str, dict[str, Any]] = {}
        """Of each group, what :func:`open_container` told of it; groups of version 2 have none."""
        self.odd_keys: dict[str, Any] = {}
        """Keys by their path components, if these do not tell them."""
        for path, stored in attributes.items():
            self._checked(path, self._read, path, stored)

    def shown(self, path: str) -> dict[str, Any]:
        """The values of a group by their keys as text."""
        values, keys = self._values[path], self._keys[path]
        if keys is None:
            return values
        by_name = {attribute_name(key): key_text(key) for key in (range(len(values)) if type(keys) is range else keys)}
        return {by_name.get(name, name): value for name, value in values.items()}

    def close(self, tensors: Mapping[str, Any], wrapper: Callable[[str, dict[str, Any], dict[Any, Any]], Any]) -> Any:
        """The state; raises as the constructor does.

        Args:
            tensors: by path.
            wrapper: makes the wrapper of tensors that a group becomes, of its path, shape and items; or returns None.
        """
        children: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for path, tensor in tensors.items():
            parent, _, name = path.rpartition("/")
            children[parent][name] = tensor
        # A group's path is shorter than those of the groups in it.
        for path in sorted(self._values, key=len, reverse=True):
            made = self._checked(path, self._close, path, children.pop(path, {}), wrapper)
            if path == self._top:
                result = made
            else:
                parent, _, name = path.rpartition("/")
                children[parent][name] = made
        if children:
            lost = min(children)
            raise Fault(IncompleteCheckpoint, node_path(lost), "no vote lists this file, but tensors in it")
        return result

    def _read(self, path: str, stored: dict[str, Any]) -> None:
        shape = stored.get(CONTAINER)
        if shape is not None:
            if type(shape) is not dict or type(shape.get("type")) is not str:
                raise ValueError("it has no type of container")
            self.shapes[path] = shape
            keys = self._read_keys(shape)
            if path == self._top and self._parts is not None:
                keys = [key for key in keys if key in self._parts]
            self._keys[path] = keys
            if type(keys) is not range:
                self.odd_keys |= {component(key): key for key in keys if not is_plain(key)}
        else:
            self._keys[path] = None
        special = (CONTAINER, HEADER) if not path else (CONTAINER,)
        self._values[path] = {
            name: from_json(value, stand_ins=self._stand_ins)
            for name, value in stored.items()
            if name not in special and (path != self._top or self._parts is None or name in self._parts)
        }

    def _read_keys(self, shape: dict[str, Any]) -> Sequence[Any]:
        if "length" in shape:
            return range(shape["length"])
        return [key if type(key) is str else from_json(key, stand_ins=self._stand_ins) for key in shape["keys"]]

    def _close(self, path: str, children: dict[str, Any], wrapper: Callable[..., Any]) -> Any:
        values, keys = self._values[path], self._keys[path]
        if keys is None:  # version 2: plain dictionaries, in no order
            return {**values, **{decode_key(name): child for name, child in children.items()}}
        if len(keys) != len(values) + len(children):
            raise ValueError(f"{len(keys)} keys for {len(values)} values and {len(children)} tensors and groups")
        items = {}
        for key in keys:
            name = attribute_name(key)
            items[key] = values[name] if name in values else children[component(key, at_root=not path)]
        if len(items) != len(keys):
            raise ValueError("two of its keys are equal")
        shape = self.shapes[path]
        made = wrapper(path, shape, items) if shape["type"] == WRAPPER else None
        return close_container(shape, items, None, stand_ins=self._stand_ins) if made is None else made

    def _checked(self, path: str, do: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except UnknownKind as unknown:
            raise Fault(
                UnknownFormatVersion, node_path(path), f"holds {unknown}, which this version of outlast does not know"
            ) from unknown
        except (StateMismatch, Fault):
            raise
        except (CannotStore, CheckpointError, *_MALFORMED) as error:
            reason = f"its attributes are not as outlast writes them: {type(error).__name__}: {str(error)[:200]}"
            raise Fault(CorruptCheckpoint, node_path(path), reason) from error
