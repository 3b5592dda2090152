"""How large a state may be that a small source describes: nothing is saved of one that only sharing keeps small.

Values that hold one another, or the same value many times over, and tensors that repeat one element take next to no
memory here, and all there is where they are written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from outlast.checkpoint.format.json_values import MAX_DEPTH, key_text
from outlast.errors import CheckpointError

_VALUES = 2_000_000
_TIMES = 16
"""Tensors that share their memory, as tied weights do, are stored once each."""
_ALWAYS_BYTES = 64 << 20


def check_size(state: dict[str, Any], source_bytes: int, source: str) -> None:
    """Raise :class:`CheckpointError`, naming the value, if a state is far larger than its source.

    Args:
        state: nested.
        source_bytes: size of the file or folder that it was read from.
        source: its path, for errors.
    """
    _Measure(source, source_bytes).of(state, ())


@dataclass(frozen=True)
class _Extent:
    values: int = 1
    nbytes: int = 0
    depth: int = 0


@dataclass
class _Measure:
    source: str
    source_bytes: int
    known: dict[int, _Extent] = field(default_factory=dict)
    """Of containers, by id: each is looked at once, however often it is held."""

    def of(self, value: Any, path: tuple[Any, ...]) -> _Extent:
        """As it will be written: what is held twice counts twice."""
        if isinstance(value, torch.Tensor):
            return _Extent(nbytes=value.numel() * value.element_size())
        if not isinstance(value, (dict, list, tuple, set, frozenset)):
            return _Extent()
        if id(value) in self.known:
            return self.known[id(value)]
        if len(path) > MAX_DEPTH:
            self._refuse(path[:9], f"its values are nested more than {MAX_DEPTH} deep")
        values, nbytes, depth = 1, 0, 0
        for key, item in _items(value):
            extent = self.of(item, (*path, key))
            values, nbytes, depth = values + extent.values, nbytes + extent.nbytes, max(depth, extent.depth + 1)
            most_bytes = _ALWAYS_BYTES + _TIMES * self.source_bytes
            if nbytes > most_bytes:
                self._refuse((*path, key), f"its tensors have more than {most_bytes} bytes, and it {self.source_bytes}")
            if values > _VALUES:
                self._refuse((*path, key), f"it holds more than {_VALUES} values, one in another")
            if len(path) + depth > MAX_DEPTH:
                self._refuse((*path, key), f"its values are nested more than {MAX_DEPTH} deep")
        self.known[id(value)] = extent = _Extent(values, nbytes, depth)
        return extent

    def _refuse(self, path: tuple[Any, ...], why: str) -> None:
        keys = (key_text(key) if isinstance(key, (str, int)) else type(key).__name__ for key in path[:9])
        name = "/".join(key[:40] for key in keys)
        raise CheckpointError(
            f"{self.source} is refused at {name!r}: {why}",
            "save it again without values and tensors that are held many times over, or import a part of it",
        )


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """What is in a container, by key; what is attached to one of a class of its own, too."""
    if not isinstance(value, dict):
        return iter(enumerate(value))
    return itertools.chain(value.items(), getattr(value, "__dict__", {}).items())
