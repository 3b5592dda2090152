"""EF21 with weighted ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar, Self

from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Compressor, Message, Slots
from outlast.comm.feedback.ef21 import EF21
from outlast.comm.feedback.probe import Probe
from outlast.config import require
from outlast.errors import CommError


class EF21W(EF21):
    """EF21 with weighted ranks, which allows a larger step if their functions differ in smoothness.
    arXiv 2402.10774. ::

        c_i = C(g_i / (n w_i) - h_i)  sent        h_i += c_i        h += sum_i w_i c_i        x -= gamma h

    from h_i = g_i^0 / (n w_i), h = sum_i w_i h_i = mean g_i^0 (first message dense). With w_i = L_i / sum_j L_j the
    step may be, for every contractive C, :func:`outlast.comm.analysis.theory.ef21_w_step`, which has the arithmetic
    mean of the L_i where EF21 has the quadratic one. Two-phase as :class:`EF21`, with w = sum_i w_i h_i. Memory: two
    slots.

    **For a positively homogeneous C**, C(a x) = a C(x) for a > 0 (Top-k, sign, absmax integers, low rank), it is EF21
    itself in other units: the iterates are the same for the same step, and EF21 may take the larger step as well. The
    weights only matter for grids that do not scale with x.

    Weights are settings: every rank needs all of them, bit-identical, before the first step (average measured L_i with
    a dense collective; :class:`outlast.comm.analysis.theory.SmoothnessEstimate` measures one rank's, and
    :func:`outlast.comm.analysis.theory.weights` makes weights of all of them). They stay as they are for the run.

    A rank encodes with its own weight, so it encodes through ``feedback.of_rank(rank)``; any instance decodes.

    Args:
        compressor: C.
        weights: w_i > 0 of each rank, rank 0 first, summing to 1.
        second: see :class:`Feedback`.

    Raises:
        OutOfRange: weights that are not positive, or do not sum to 1.
    """

    name: ClassVar[str] = "ef21-w"

    def __init__(self, compressor: Compressor, weights: Sequence[float], second: Compressor | None = None) -> None:
        super().__init__(compressor, second)
        self.weights = tuple(weights)
        require(
            len(self.weights) > 0 and all(0 < w <= 1 for w in self.weights) and abs(math.fsum(self.weights) - 1) < 1e-6,
            "weights",
            self.weights,
            "positive numbers that sum to 1",
        )
        self._rank: int | None = None

    def of_rank(self, rank: int) -> Self:
        """The method as ``rank`` runs it.

        Raises:
            CommError: there is no weight for that rank.
        """
        if not 0 <= rank < len(self.weights):
            raise CommError(f"ef21-w has {len(self.weights)} weights, none for rank {rank}", "give one for each rank")
        bound = copy.copy(self)
        bound._rank = rank
        return bound

    @property
    def share(self) -> float:
        """n w_i of the rank that it is bound to.

        Raises:
            CommError: it is not bound to a rank.
        """
        if self._rank is None:
            raise CommError("ef21-w encodes with the weight of its rank", "encode through feedback.of_rank(rank)")
        return len(self.weights) * self.weights[self._rank]

    def _own(self, g: Tensor) -> Slots:
        return {"h_i": g / self.share}

    def encode(self, local: Slots, g: Tensor, out: Tensor | None = None, probe: Probe | None = None) -> Tensor:
        target = scratch("target", g.numel(), g.dtype, g.device).view(g.shape)
        target.copy_(g).div_(self.share)
        return self._track(local, target, g, out, probe)

    def encode_dense(self, local: Slots, g: Tensor) -> Tensor:
        local["h_i"].copy_(g).div_(self.share)
        return g

    def _add(self, messages: Sequence[Message], out: Tensor) -> None:
        if len(messages) != len(self.weights):
            raise CommError(
                f"messages of {len(messages)} ranks, weights of {len(self.weights)}", "give one weight for each rank"
            )
        for weight, message in zip(self.weights, messages, strict=True):
            message.add_to(out, weight)
