"""torch's clipping of gradients, applied to averaged updates: an error before it scales them down.

The norm of an update is about the square root of the number of parameters, so clipping it to 1 leaves almost nothing of
it, and training goes on, badly, without a sign. ``torch.nn.utils.clip_grad`` is imported under many names, so one
function that it calls itself is wrapped, while there is a reducer that averages updates.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.utils.clip_grad as torch_clipping
from torch import Tensor

from outlast.errors import CommError

_INNER = "_group_tensors_by_device_and_dtype"
_watching: weakref.WeakSet[Any] = weakref.WeakSet()
_original: list[Callable[..., Any]] = []


def watch(owner: Any) -> None:
    """From now on ``owner.update_in(grads)`` is asked, and answers the name of the first whose update is among them."""
    if not _original and hasattr(torch_clipping, _INNER):
        _original.append(getattr(torch_clipping, _INNER))
        setattr(torch_clipping, _INNER, _group)
    _watching.add(owner)


def unwatch(owner: Any) -> None:
    """The reverse of :func:`watch`; with the last one torch is as it was."""
    _watching.discard(owner)
    if not _watching and _original and getattr(torch_clipping, _INNER) is _group:
        setattr(torch_clipping, _INNER, _original.pop())


def _group(tensors: Sequence[Sequence[Tensor | None]], *args: Any, **kwargs: Any) -> Any:
    frame = sys._getframe(1)
    grads = tensors[0]
    if frame.f_code.co_name == "_clip_grads_with_norm_":
        _refuse_norm(grads, float(frame.f_locals["max_norm"]), frame.f_locals["total_norm"])
    elif frame.f_code.co_name == "clip_grad_value_":
        _refuse_value(grads, float(frame.f_locals["clip_value"]))
    return _original[0](tensors, *args, **kwargs)


def _refuse_norm(grads: Sequence[Tensor | None], max_norm: float, total_norm: Tensor) -> None:
    """A norm that is below the limit, as when it is only asked for (``max_norm = inf``), changes nothing."""
    if math.isinf(max_norm):
        return
    name = _update_in(grads)
    if name is None:
        return
    whole = getattr(total_norm, "full_tensor", None)  # of a DTensor
    norm = float(total_norm if whole is None else whole())
    if max_norm < norm:
        raise _error("clip_grad_norm_", name, f"their norm, {norm:.4g}, would be scaled down to {max_norm:g}")


def _refuse_value(grads: Sequence[Tensor | None], limit: float) -> None:
    name = _update_in(grads)
    if name is None:
        return
    largest = max((_largest(grad) for grad in grads if grad is not None), default=0.0)
    if largest > limit:
        raise _error("clip_grad_value_", name, f"their largest entry, {largest:.4g}, would be cut to {limit:g}")


def _largest(grad: Tensor) -> float:
    to_local = getattr(grad, "to_local", None)  # of a DTensor
    own = grad if to_local is None else to_local()
    return float(own.abs().max()) if own.numel() else 0.0


def _update_in(grads: Sequence[Tensor | None]) -> str | None:
    for owner in list(_watching):
        name = owner.update_in(grads)
        if name is not None:
            return str(name)
    return None


def _error(function: str, name: str, what: str) -> CommError:
    return CommError(
        f"torch.nn.utils.{function} on averaged updates ({name} ...): with comm.target = 'update' .grad holds the "
        f"direction in which Adam would go, not a gradient, and {what}",
        "leave it out: each tensor's direction is bounded already, by clip_rms, which is 1 unless it is set by "
        "attach(..., direction=outlast.comm.direction.Adam(clip_rms=...)); or set target = 'gradient'",
    )
