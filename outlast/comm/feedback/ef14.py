"""Error compensation, and its reference without compensation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Compressor, Message, Shape, Slots
from outlast.comm.config import RESIDUALS
from outlast.comm.feedback import packed
from outlast.comm.feedback.base import Compensated, Feedback
from outlast.comm.feedback.probe import Probe
from outlast.config import nearest
from outlast.errors import OutOfRange


class NoFeedback(Feedback):
    """Plain compressed gradients: sends C(g_i), x -= gamma * mean C(g_i). **Diverges**; for tests and reference only.

    Three quadratics on which it grows by a constant factor a step are in Beznosikov et al., arXiv 2002.12410. In the
    two-phase transport owners send C'(mean C(g_i)), and keep nothing either.
    """

    name: ClassVar[str] = "none"

    def _own(self, g: Tensor) -> Slots:
        return {}

    def encode(self, local: Slots, g: Tensor, out: Tensor | None = None, probe: Probe | None = None) -> Tensor:
        message = self.compressor.compress(g, out, local)
        if probe is not None:
            probe.saw_target(g)
            error = g.clone()
            message.add_to(error, -1.0)
            probe.saw_rest(error, error, g)
        return message.payload

    def _relay(
        self, owned: Slots, replicated: Slots, messages: Sequence[Message], like: Tensor, out: Tensor | None
    ) -> Tensor:
        mean = scratch("mean", like.numel(), like.dtype, like.device).view(like.shape).zero_()
        self._add(messages, mean)
        return self.second.compress(mean, out, owned).payload

    def encode_dense(self, local: Slots, g: Tensor) -> Tensor:
        return g


class EF14(Compensated):
    """Error compensation: what was not sent is added to the next gradient. arXiv 1809.07599, arXiv 1901.09847. ::

        p_i = e_i + gamma g_i        send C(p_i)        e_i = p_i - C(p_i)        x -= mean C(p_i)

    In the two-phase transport the owner of a slice does the same with the mean (arXiv 2102.02888, section 4): ::

        s += mean C(p_i)             send C(s)          s -= C(s)                 x -= C(s)

    Deviation: the papers keep the step size inside the memory; here p_i = e_i + g_i, so that the estimate is a gradient
    that any optimizer may take. With constant gamma the iterates are the same. A schedule scales a late entry by the
    step size of the step that sends it.

    Its error floor grows with the difference between ranks' data, so it suits shuffled data; step size and bound are
    :func:`outlast.comm.analysis.theory.ef14_step` and :func:`~outlast.comm.analysis.theory.ef14_bound`. Memory: one
    slot, e.

    ``residual="int8"`` takes a quarter of that: e is kept as 8-bit integers with a scale for every 256 entries, rounded
    again in each step (:mod:`outlast.comm.feedback.packed`). **Nothing feeds this rounding error back.** Its mean over
    steps is zero, so small entries still add up and are sent in time, and it is bounded by the scale, 1/126 of the
    largest residual of its 256. But it is noise in the gradient, of a size that falls with the gradients; if data
    differ between ranks it has a floor, like the method itself. Slots: ``e_int8``, ``e_scale``, ``e_round``.

    Args:
        compressor: C.
        second: see :class:`Feedback`.
        residual: how e is kept: ``full`` (the gradient's type) or ``int8``.

    Raises:
        OutOfRange: no such way to keep e.
    """

    name: ClassVar[str] = "ef14"
    residual_slots: ClassVar[tuple[str, ...]] = ("e",)

    def __init__(self, compressor: Compressor, second: Compressor | None = None, *, residual: str = "full") -> None:
        super().__init__(compressor, second)
        if residual not in RESIDUALS:
            raise OutOfRange(f"residual = {residual!r} is not known", nearest(residual, RESIDUALS))
        self.residual = residual
        self.own_slots = ("e",) if residual == "full" else ()

    @property
    def apart_slots(self) -> tuple[str, ...]:
        slots = super().apart_slots
        return slots if self.residual == "full" else (*slots, *(f"e_{part}" for part in packed.PARTS))

    def new_apart(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Slots:
        slots = super().new_apart(shape, dtype, device)
        if self.residual != "full":
            slots |= packed.new_slot("e", shape, device)
        return slots

    def _own(self, g: Tensor) -> Slots:
        return {"e": torch.zeros_like(g)} if self.residual == "full" else {}

    def unpack(self, local: Slots, shape: Shape, dtype: torch.dtype) -> Slots:
        if self.residual == "full":
            return super().unpack(local, shape, dtype)
        e = torch.empty(shape, dtype=dtype, device=local["e_int8"].device)
        return {"e": packed.unpack_slot(local, "e", e)}

    def pack(self, own: Slots) -> Slots:
        if self.residual == "full":
            return super().pack(own)
        local = packed.new_slot("e", tuple(own["e"].shape), own["e"].device)
        packed.pack_slot(local, "e", own["e"])
        return local

    def encode(self, local: Slots, g: Tensor, out: Tensor | None = None, probe: Probe | None = None) -> Tensor:
        e = self._residual(local, g)
        message = self.compressor.compress_sum(e, g, out, local)
        if probe is not None:
            probe.saw_target(e)
        message.add_to(e, -1.0)
        if probe is not None:
            probe.saw_rest(e, e, g)
        self._keep(local, e)
        return message.payload

    def encode_dense(self, local: Slots, g: Tensor) -> Tensor:
        e = self._residual(local, g)
        message = e.add(g)  # with e = 0, as in a warm-up from the start, this is g
        self._keep(local, e.zero_())
        return message

    def _residual(self, local: Slots, g: Tensor) -> Tensor:
        """e, to be changed in place and then kept."""
        if self.residual == "full":
            return local["e"]
        e = scratch("residual", g.numel(), g.dtype, g.device).view(g.shape)
        return packed.unpack_slot(local, "e", e)

    def _keep(self, local: Slots, e: Tensor) -> None:
        if self.residual != "full":
            packed.pack_slot(local, "e", e)
