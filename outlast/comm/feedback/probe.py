"""Figures on what error feedback does to gradients, for telemetry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Probe:
    """Adds up, over the tensors or slices that one rank encodes, squared norms from which two figures follow.

    Give the same probe to every ``Feedback.encode`` of a step, or a fresh one to each tensor. All are sums over
    entries, in float64 from norms in the tensor's own type. NaN and Inf pass through.
    """

    target_square: float = 0.0
    """||t||^2 of the targets t that were compressed: e + g, g - h, or what else the method compresses."""
    error_square: float = 0.0
    """||C(t) - t||^2."""
    residual_square: float = 0.0
    """||e||^2, or where gradients are tracked ||g - h||^2, after the step."""
    gradient_square: float = 0.0
    """||g||^2 of the gradients handed in."""

    @property
    def alpha_hat(self) -> float:
        """Measured contraction, 1 - ||C(t) - t||^2 / ||t||^2; 1 where nothing but zeros was compressed."""
        return 1.0 - self.error_square / self.target_square if self.target_square else 1.0

    @property
    def residual_ratio(self) -> float:
        """||e|| / ||g||, or where gradients are tracked ||g - h|| / ||g||; Inf where the gradients are all zero."""
        if not self.gradient_square:
            return math.inf if self.residual_square else 0.0
        return math.sqrt(self.residual_square / self.gradient_square)

    def saw_target(self, target: Tensor) -> None:
        """Before C is subtracted from it."""
        self.target_square += square(target)

    def saw_rest(self, error: Tensor, residual: Tensor, g: Tensor, share: float = 1.0) -> None:
        """After: C(t) - t, what is held back (in units of the gradient: times ``share``), and the gradient."""
        self.error_square += square(error)
        self.residual_square += share**2 * square(residual)
        self.gradient_square += square(g)


def square(x: Tensor) -> float:
    """||x||^2."""
    return float(torch.linalg.vector_norm(x)) ** 2
