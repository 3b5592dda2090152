"""EF21 with the accumulated error fed back."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Compressor, Shape, Slots
from outlast.comm.feedback.ef21 import EF21
from outlast.comm.feedback.probe import Probe
from outlast.config import require


class EControl(EF21):
    """EF21 with the accumulated error fed back at a controlled strength. arXiv 2311.05645. ::

        c_i = C(eta e_i + g_i - h_i)  sent        e_i += g_i - h_i - c_i
        h_i += c_i        h += mean c_i        x -= gamma h

    from e_i = 0, h_i = g_i^0, h = mean h_i (first message dense). eta = 0 is EF21. A dense step sets h_i = g_i and
    drops e_i. In the two-phase transport owners do as in :class:`EF21`. Memory: three slots, e_i, h_i and h.

    Deviations: the paper's theory asks for eta = delta / 400 (:func:`outlast.comm.analysis.theory.econtrol_eta`), which
    is too small to be of use in any run of practical length, and its experiments tune eta; here it defaults to
    min(delta, 0.5), and above min(2 delta, 0.5), where the iteration is unstable, it is refused. delta is
    ``Compressor.typical_alpha``: of signs 2 / pi, where the guaranteed 1 / d would leave nothing of the method.

    It is for gradients. Of Adam's directions, which are mostly noise, h_i holds one sample of an entry for 1 / delta
    steps, and eta pays the difference back as slowly: see docs/compression.md.

    Args:
        compressor: C.
        eta: strength; None takes min(delta, 0.5) for each tensor.
        second: see :class:`Feedback`.

    Raises:
        OutOfRange: eta is above what any compressor allows; above what this one allows, :meth:`start` raises.
    """

    name: ClassVar[str] = "econtrol"
    own_slots: tuple[str, ...] = ("e", "h_i")
    residual_slots: ClassVar[tuple[str, ...]] = ("e",)

    def __init__(self, compressor: Compressor, eta: float | None = None, second: Compressor | None = None) -> None:
        super().__init__(compressor, second)
        self.eta = eta
        require(eta is None or 0 < eta <= 0.5, "eta", eta, "0 < eta <= min(2 * alpha, 0.5)")

    def strength(self, shape: Shape) -> float:
        """eta for a tensor of ``shape``.

        Raises:
            OutOfRange: the eta asked for is above min(2 delta, 0.5).
        """
        alpha = self.compressor.typical_alpha(shape)
        if self.eta is None:
            return min(alpha, 0.5)
        allowed = min(2 * alpha, 0.5)
        rule = f"0 < eta <= min(2 * alpha, 0.5) = {allowed:g} for a tensor of shape {tuple(shape)}"
        require(self.eta <= allowed, "eta", self.eta, rule)
        return self.eta

    def _own(self, g: Tensor) -> Slots:
        self.strength(tuple(g.shape))
        return {"e": torch.zeros_like(g), "h_i": g.clone()}

    def encode(self, local: Slots, g: Tensor, out: Tensor | None = None, probe: Probe | None = None) -> Tensor:
        e, h_i = local["e"], local["h_i"]
        difference = scratch("difference", g.numel(), g.dtype, g.device).view(g.shape)
        target = scratch("target", g.numel(), g.dtype, g.device).view(g.shape)
        torch.sub(g, h_i, out=difference)
        torch.add(difference, e, alpha=self.strength(tuple(g.shape)), out=target)
        if probe is not None:
            probe.saw_target(target)
        message = self.compressor.compress(target, out, local)
        e.add_(difference)
        message.add_to(e, -1.0)
        message.add_to(h_i)
        if probe is not None:
            message.add_to(target, -1.0)
            probe.saw_rest(target, torch.sub(g, h_i), g)
        return message.payload

    def encode_dense(self, local: Slots, g: Tensor) -> Tensor:
        local["e"].zero_()
        return local["h_i"].copy_(g)
