"""Step sizes and guarantees, where theory gives them, and the smoothness constants that they need.

Notation: f = mean of f_i over n ranks; f is L-smooth and f_i is L_i-smooth (gradients are Lipschitz with these
constants, in units of gradient per unit of parameter); alpha is the contraction of the compressor
(``Compressor.alpha``); gamma is the step of ``x -= gamma * estimate``; T counts steps. Guarantees are for exact
gradients. They are worst cases (on logistic regression, steps 16 to 64 times as long converge), and none covers the
steps of an adaptive optimizer. There is no rule here for the step size of EF21-SGDM, EF21-BC, EF21-PP and EControl.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from outlast.comm.feedback.probe import square
from outlast.config import require


class Markov(NamedTuple):
    """How EF21's error changes from step to step under a contraction.

    With G_t = mean ||h_i - g_i||^2, ``G_{t+1} <= (1 - theta) G_t + beta * mean ||g_i^{t+1} - g_i^t||^2``.
    """

    theta: float
    beta: float


def theta_beta(alpha: float) -> Markov:
    """theta = 1 - sqrt(1 - alpha) and beta = (1 - alpha) / (1 - sqrt(1 - alpha)): arXiv 2106.05203.

    They make sqrt(beta / theta) = sqrt(1 - alpha) / (1 - sqrt(1 - alpha)), about 2 / alpha, as small as it can be.

    Raises:
        OutOfRange: alpha is not in (0, 1].
    """
    require(0 < alpha <= 1, "alpha", alpha, "0 < alpha <= 1")
    theta = 1 - math.sqrt(1 - alpha)
    return Markov(theta, (1 - alpha) / theta)


def ef21_step(smoothness: float, each: Sequence[float], alpha: float) -> float:
    """The largest gamma that EF21's theorem allows: arXiv 2106.05203, theorem 1. ::

        gamma = 1 / (L + L~ sqrt(beta / theta))        L~ = sqrt(mean L_i^2)

    The paper's poster prints L~ = mean L_i^2, without the root; the units and the authors' code require it.

    Args:
        smoothness: L.
        each: L_i of every rank.
        alpha: the compressor's contraction.

    Raises:
        OutOfRange: a constant that is not positive, or alpha not in (0, 1].
    """
    quadratic_mean = math.sqrt(math.fsum(li * li for li in _positive(smoothness, each)) / len(each))
    return 1 / (smoothness + quadratic_mean * _ratio(alpha))


def ef21_w_step(smoothness: float, each: Sequence[float], alpha: float) -> float:
    """The largest gamma of EF21-W's theorem: arXiv 2402.10774. ::

        gamma = 1 / (L + mean L_i sqrt(beta / theta))

    Never smaller than :func:`ef21_step`. The theorem holds for EF21-W with every contractive compressor; that one is
    positively homogeneous is only needed for plain EF21 to be the same method, and so to take this step as well.

    Args:
        smoothness: L.
        each: L_i of every rank.
        alpha: the compressor's contraction.

    Raises:
        OutOfRange: a constant that is not positive, or alpha not in (0, 1].
    """
    mean = math.fsum(_positive(smoothness, each)) / len(each)
    return 1 / (smoothness + mean * _ratio(alpha))


def ef21_bound(gap: float, gamma: float, steps: int, alpha: float, start_error: float = 0.0) -> float:
    """What EF21 guarantees for gamma up to :func:`ef21_step`: arXiv 2106.05203, theorem 1. ::

        mean over t < T of ||grad f(x_t)||^2  <=  2 (f(x_0) - inf f) / (gamma T)  +  G_0 / (theta T)

    Args:
        gap: f(x_0) - inf f, or anything above it.
        gamma: the step size.
        steps: T.
        alpha: the compressor's contraction.
        start_error: G_0 = mean ||h_i - g_i||^2 at x_0; 0 where the first message is dense.
    """
    return 2 * gap / (gamma * steps) + start_error / (theta_beta(alpha).theta * steps)


def ef14_step(smoothness: float, alpha: float) -> float:
    """A gamma for which :func:`ef14_bound` holds: min(1 / (4 L), alpha / (4 L sqrt(1 - alpha))).

    Args:
        smoothness: L.
        alpha: the compressor's contraction.

    Raises:
        OutOfRange: L is not positive, or alpha not in (0, 1].
    """
    require(smoothness > 0, "smoothness", smoothness, "smoothness > 0")
    require(0 < alpha <= 1, "alpha", alpha, "0 < alpha <= 1")
    if alpha == 1:
        return 1 / (4 * smoothness)
    return min(1.0, alpha / math.sqrt(1 - alpha)) / (4 * smoothness)


def ef14_bound(
    gap: float, gamma: float, steps: int, smoothness: float, alpha: float, dissimilarity: float = 0.0
) -> float:
    """What EF14 guarantees for gamma up to :func:`ef14_step`, from e_i = 0. ::

        mean over t < T of ||grad f(x_t)||^2
            <=  4 (f(x_0) - inf f) / (gamma T)  +  8 gamma^2 L^2 (1 - alpha) / alpha^2 * zeta^2

    The technique is that of arXiv 1909.05350 (iterates corrected by the error), with constants worked out here for
    exact gradients. Proof: let e = mean e_i and x~ = x - gamma e, so that x~ moves by -gamma grad f(x) exactly. With
    L-smoothness and gamma <= 1 / (4 L) ::

        f(x~_{t+1}) <= f(x~_t) - gamma / 2 (1 - L gamma) ||grad f(x_t)||^2 + gamma / 2 L^2 gamma^2 ||e_t||^2

    Contraction and Young's inequality give ||e_i'||^2 <= (1 - alpha / 2) ||e_i||^2 + 2 (1 - alpha) / alpha ||g_i||^2,
    so the sum over t of mean ||e_i||^2 is at most 4 (1 - alpha) / alpha^2 times that of mean ||g_i||^2, which is
    ||grad f||^2 + zeta^2. Where gamma <= alpha / (4 L sqrt(1 - alpha)), what e takes is at most gamma / 8, and what
    L gamma takes another gamma / 8, of the gamma / 2 in front of ||grad f||^2; divide by the gamma / 4 left.

    The second term is EF14's floor: it grows with gamma^2 and with the difference between ranks' data.

    Args:
        gap: f(x_0) - inf f, or anything above it.
        gamma: the step size.
        steps: T.
        smoothness: L.
        alpha: the compressor's contraction.
        dissimilarity: zeta^2, the largest mean ||g_i - grad f||^2 on the way.
    """
    floor = 8 * (gamma * smoothness) ** 2 * (1 - alpha) / alpha**2 * dissimilarity
    return 4 * gap / (gamma * steps) + floor


def econtrol_eta(alpha: float) -> float:
    """The strength of EControl's theorem, alpha / 400: arXiv 2311.05645.

    :class:`~outlast.comm.feedback.EControl` defaults to min(alpha, 0.5), which converges some hundred times faster.

    Raises:
        OutOfRange: alpha is not in (0, 1].
    """
    require(0 < alpha <= 1, "alpha", alpha, "0 < alpha <= 1")
    return alpha / 400


class SmoothnessEstimate:
    """One rank's L_i, measured along the way: the largest ||g_i(x') - g_i(x)|| / ||x' - x|| seen.

    Both gradients of a pair must come from the same minibatch; else it is the noise that is measured. Each rank keeps
    one for itself: gather the figures of all ranks to compute :func:`weights`.

    Args:
        memory: factor by which the largest figure so far shrinks in every update, 0 < memory <= 1; 1 keeps it for good.

    Raises:
        OutOfRange: memory out of its range.
    """

    def __init__(self, memory: float = 1.0) -> None:
        require(0 < memory <= 1, "memory", memory, "0 < memory <= 1")
        self.memory = memory
        self.value = 0.0
        """L_i in units of gradient per unit of parameter; 0 before the first update."""

    def update(self, g: Tensor, g_before: Tensor, x: Tensor, x_before: Tensor) -> float:
        """Include a pair of points, and return the estimate.

        Args:
            g: gradient of the minibatch at ``x``, any shape.
            g_before: gradient of the same minibatch at ``x_before``.
            x: parameters, of the gradients' shape.
            x_before: parameters before; if they are equal to ``x``, the estimate does not change.
        """
        moved = square(x - x_before)
        if moved > 0:
            self.value = max(self.memory * self.value, math.sqrt(square(g - g_before) / moved))
        return self.value


def estimate_smoothness(gradients: Sequence[Tensor], points: Sequence[Tensor]) -> float:
    """L_i from the gradients of one minibatch (or of a whole function) at some points, each against the one before.

    A lower bound of the true constant.

    Args:
        gradients: at least two, any shape.
        points: as many, of the gradients' shape.

    Raises:
        OutOfRange: fewer than two points, or not as many as gradients.
    """
    require(len(points) == len(gradients) >= 2, "points", len(points), "as many as gradients, and at least two")
    estimate = SmoothnessEstimate()
    for after in range(1, len(points)):
        estimate.update(gradients[after], gradients[after - 1], points[after], points[after - 1])
    return estimate.value


def weights(each: Sequence[float], low: float = 0.25, high: float = 4.0) -> tuple[float, ...]:
    """EF21-W's weights, w_i = L_i / sum_j L_j (arXiv 2402.10774), kept within [low, high] / n.

    Deviation: the paper knows the L_i. Measured ones may be far off, so no rank's weight may leave the range; a common
    factor on the weights inside it keeps the sum at 1.

    Args:
        each: L_i >= 0 of every rank; all zero gives equal weights.
        low: smallest n w_i, 0 < low <= 1.
        high: largest n w_i, at least 1.

    Raises:
        OutOfRange: no ranks, a negative or infinite L_i, or limits out of range.
    """
    n = len(each)
    require(n > 0 and all(0 <= li < math.inf for li in each), "each", tuple(each), "numbers of at least 0, and one")
    require(0 < low <= 1 <= high, "low, high", (low, high), "0 < low <= 1 <= high")
    top = max(each)
    if top == 0:
        return (1 / n,) * n
    shares = [max(li / top, 1e-12) for li in each]  # so that a factor can lift those that are 0

    def limited(factor: float) -> list[float]:
        return [min(max(factor * share, low), high) / n for share in shares]

    below, above = 0.0, high * 1e12  # the sum grows with the factor, from low to high
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if math.fsum(limited(middle)) < 1 else (below, middle)
    unnormalised = limited(above)
    total = math.fsum(unnormalised)
    return tuple(w / total for w in unnormalised)


def _ratio(alpha: float) -> float:
    """sqrt(beta / theta)."""
    theta, beta = theta_beta(alpha)
    return math.sqrt(beta / theta)


def _positive(smoothness: float, each: Sequence[float]) -> Sequence[float]:
    require(smoothness > 0, "smoothness", smoothness, "smoothness > 0")
    require(len(each) > 0 and all(li > 0 for li in each), "each", tuple(each), "positive numbers, one for each rank")
    return each
