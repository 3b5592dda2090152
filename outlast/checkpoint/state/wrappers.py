"""Tensors that wrap other tensors (traceable wrapper subclasses, as torchao's): stored by their inner tensors.

A checkpoint records the class and its context, and creates neither: the class comes from the running state. Restored
into, or like, a wrapper of the same class and context, the inner tensors become one of these again; otherwise they come
back as a dictionary.
"""

from __future__ import annotations

from typing import Any

import torch

from outlast.checkpoint.format.dtypes import dtype_name
from outlast.checkpoint.format.json_values import VALUES
from outlast.checkpoint.format.kinds import CannotStore
from outlast.errors import CheckpointError, StateMismatch

WRAPPER = "tensor"
"""The type of its group."""


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor consists of others, and can be made of them again."""
    kind = type(tensor)
    return (
        kind is not torch.Tensor
        and hasattr(kind, "__tensor_flatten__")
        and hasattr(kind, "__tensor_unflatten__")
        and not hasattr(kind, "full_tensor")  # a DTensor, which is stored by its shards
        and not tensor.is_nested  # its sizes are symbols, which mean something to one process alone
    )


def open_wrapper(tensor: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What describes a wrapper, as JSON, and its inner tensors by name, detached.

    Raises:
        CannotStore: it has parts that are no tensors, or a context that cannot be stored.
    """
    kind = type(tensor)
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {str(name): getattr(tensor, name) for name in names}
    for name, part in inner.items():
        if not isinstance(part, torch.Tensor):
            raise CannotStore(
                f"is a {kind.__module__}.{kind.__qualname__} whose part {name!r} is a {type(part).__qualname__}",
                "store the plain tensors it consists of",
            )
    try:
        encoded = VALUES.encode(context, lambda path: "/".join(["its context", *map(str, path)]))
    except CheckpointError as error:
        raise CannotStore(
            f"is a {kind.__module__}.{kind.__qualname__}, and {error.what}", "store the plain tensors it consists of"
        ) from error
    described = {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "context": encoded,
        "shape": [int(size) for size in tensor.shape],
        "dtype": dtype_name(tensor.dtype),
    }
    return described, {name: part.detach() for name, part in inner.items()}


def check_wrapper(shape: dict[str, Any], running: torch.Tensor, name: str) -> None:
    """Check that a stored wrapper is of the class, context, shape and dtype of the running one.

    Raises:
        StateMismatch: names the first that differs.
    """
    try:
        described, _ = open_wrapper(running)
    except CannotStore as refused:
        raise CheckpointError(f"{name!r} {refused.what}", refused.fix) from refused
    for what, ours in described.items():
        if shape.get(what) != ours:
            raise StateMismatch(
                f"{name!r}: its {what} is {shape.get(what)!r:.200} in the checkpoint, {ours!r:.200} in the running "
                "state",
                "restore into a tensor that was quantised, or wrapped, in the same way",
            )


def close_wrapper(inner: dict[str, Any], running: torch.Tensor | None) -> Any:
    """A tensor like the running one, of these inner tensors; without one, the inner tensors."""
    if running is None:
        return inner
    kind: Any = type(running)
    _, context = running.__tensor_flatten__()  # type: ignore[attr-defined]
    with torch.no_grad():
        return kind.__tensor_unflatten__(inner, context, running.shape, running.stride())
