"""JSON values of the state as Zarr attributes: exact, strict JSON, nothing converted silently.

Numbers keep their value bit for bit (Python writes the shortest text that reads back as the same float). JSON has no
NaN and no infinities: they are written as ``{"outlast_float": "NaN"}``, and tuples as ``{"outlast_tuple": [...]}``.
"""

from __future__ import annotations

import math
from typing import Any

from outlast.errors import CheckpointError

_ODD = "outlast_float"
_TUPLE = "outlast_tuple"
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: object, where: str) -> Any:
    """A copy of ``value`` that :func:`json.dumps` writes as strict JSON.

    Args:
        value: see the module.
        where: its name, for errors.

    Raises:
        CheckpointError: JSON cannot give back something as it was (a set, an array, a key that is not a string).
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return {_ODD: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, list):
        return [to_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if type(value) is tuple:  # a named tuple would come back without its names
        return {_TUPLE: to_json(list(value), where)}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key in (_ODD, _TUPLE):
                raise CheckpointError(
                    f"the state at {where!r} has the key {key!r}", f"keys must be strings other than {_ODD}, {_TUPLE}"
                )
        return {key: to_json(item, f"{where}/{key}") for key, item in value.items()}
    raise CheckpointError(
        f"the state at {where!r} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored",
        "store tensors (in dictionaries), numbers, strings, lists, tuples, None, True, False and dictionaries of these",
    )


def from_json(value: Any) -> Any:
    """The inverse of :func:`to_json`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_ODD}:
            return _WORDS[value[_ODD]]
        if set(value) == {_TUPLE}:
            return tuple(from_json(value[_TUPLE]))
        return {key: from_json(item) for key, item in value.items()}
    return value
