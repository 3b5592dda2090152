"""Measures what error feedback does to gradients, for telemetry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Probe:
    """Adds up, over the tensors or slices that one rank encodes, squared norms from which two figures follow.

    Pass the same probe to every ``Feedback.encode`` of a step, or a new one for each tensor. All are sums over entries,
    in float64, of norms in the tensor's own type. NaN and Inf pass through.
    """

    target_square: float = 0.0
    """||t||^2 of the targets t that were compressed: e + g, g - h, or whatever the method compresses."""
    error_square: float = 0.0
    """||C(t) - t||^2."""
    residual_square: float = 0.0
    """||e||^2, or where gradients are tracked ||g - h||^2, after the step."""
    gradient_square: float = 0.0
    """||g||^2 of the gradients handed in."""

    @property
    def alpha_hat(self) -> float:
        """Measured contraction, 1 - ||C(t) - t||^2 / ||t||^2; 1 if only zeros were compressed."""
        return 1.0 - self.error_square / self.target_square if self.target_square else 1.0

    @property
    def residual_ratio(self) -> float:
        """||e|| / ||g||, or where gradients are tracked ||g - h|| / ||g||; Inf if all gradients are zero."""
        if not self.gradient_square:
            return math.inf if self.residual_square else 0.0
        return math.sqrt(self.residual_square / self.gradient_square)

    def saw_target(self, target: Tensor) -> None:
        """Call it before C(t) is subtracted from the target t."""
        self.target_square += square(target)

    def saw_rest(self, error: Tensor, residual: Tensor, g: Tensor, share: float = 1.0) -> None:
        """Call it afterwards.

        Args:
            error: C(t) - t.
            residual: what is held back; times ``share`` it is in units of the gradient.
            g: the gradient.
            share: see :attr:`Feedback.share`.
        """
        self.error_square += square(error)
        self.residual_square += share**2 * square(residual)
        self.gradient_square += square(g)


def square(x: Tensor) -> float:
    """||x||^2."""
    return float(torch.linalg.vector_norm(x)) ** 2
