"""The norm of all gradients in a few operations, and, once it is not finite, where that comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from outlast.diagnostics.numerics.model_parts import local


def norm_of(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The norm of the gradients on this rank, a scalar on their device; None without gradients. Nothing is waited for.

    One operation for all tensors of a device and type, and two more.
    """
    grads = [local(one.grad) for one in parameters if one.grad is not None]
    grads = [one for one in grads if one.numel()]
    return get_total_norm(grads) if grads else None


@dataclass(frozen=True, slots=True)
class BadGradients:
    """Which gradients are not finite."""

    first: int | None
    """The number of the first in backward order, which is the last in the model's; None: all are finite."""
    count: int
    of: int
    """How many gradients there are."""
    largest: int | None
    """Where the largest entry is, if all are finite: their squares' sum has overflowed."""


def bad_gradients(gradients: Sequence[Tensor | None]) -> BadGradients:
    """Look at each gradient. The host waits once; only called when something is wrong.

    Args:
        gradients: in the model's order; None where a parameter has none.
    """
    present = [(number, local(one)) for number, one in enumerate(gradients) if one is not None]
    present = [(number, one) for number, one in present if one.numel()]
    if not present:
        return BadGradients(None, 0, 0, None)
    sizes = torch.stack([one.abs().amax().to(present[0][1].device, torch.float64) for _, one in present])
    found = [present[place][0] for place in (~torch.isfinite(sizes)).nonzero().view(-1).tolist()]
    largest = None if found else present[int(sizes.argmax())][0]
    return BadGradients(max(found, default=None), len(found), len(present), largest)
