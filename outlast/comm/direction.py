"""From a rank's gradient to the direction in which an optimizer would go, which target = "update" compresses."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Slots
from outlast.comm.config import UPDATE_BETA1, UPDATE_CLIP_RMS
from outlast.config import require


class Direction(Protocol):
    """An optimizer's update of one tensor at learning rate 1, as a state machine on slots owned by the caller."""

    slots: tuple[str, ...]

    def start(self, like: Tensor) -> Slots:
        """The slots before the first step; the same on every rank."""
        ...

    def move(self, slots: Slots, g: Tensor, out: Tensor) -> Tensor:
        """Move ``slots`` by the gradient ``g``, which is not changed; write the direction to ``out`` and return it."""
        ...


class Adam:
    """Adam's direction (arXiv 1412.6980, algorithm 1; with decoupled weight decay that of AdamW). ::

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    so that ``x -= lr * (u + weight_decay * x)``, which is ``torch.optim.SGD(lr=lr, weight_decay=weight_decay)`` on u,
    is a step of AdamW. Memory: two slots, and t, a scalar; with beta1 = 0, where m is g, one slot.

    With ``clip_rms`` c > 0 a direction is scaled down where it is larger than most: ``u / max(1, RMS(u) / c)``, the
    root mean square over the entries of what :meth:`move` is given (Adafactor's update clipping, arXiv 1804.04235,
    section 6). A gradient several times as large as those before it then moves parameters no further than they did;
    without a first moment, nothing else ensures that.

    Args:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        clip_rms: c; 0 scales nothing down.

    Raises:
        OutOfRange: a number that is not allowed.
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, clip_rms: float = 0.0) -> None:
        require(0 <= beta1 < 1, "beta1", beta1, "0 <= beta1 < 1")
        require(0 <= beta2 < 1, "beta2", beta2, "0 <= beta2 < 1")
        require(eps > 0, "eps", eps, "eps > 0")
        require(clip_rms >= 0, "clip_rms", clip_rms, "clip_rms >= 0")
        self.beta1, self.beta2, self.eps, self.clip_rms = beta1, beta2, eps, clip_rms
        self.slots: tuple[str, ...] = ("m", "v", "t") if beta1 else ("v", "t")

    def start(self, like: Tensor) -> Slots:
        slots = {slot: torch.zeros_like(like) for slot in self.slots if slot != "t"}
        return slots | {"t": torch.zeros((), dtype=torch.float32, device=like.device)}

    def move(self, slots: Slots, g: Tensor, out: Tensor) -> Tensor:
        # Torch's fused kernel takes a parameter that is zero to -u in one pass over memory.
        out.zero_()
        m = slots.get("m")
        if m is None:
            m = scratch("first moment", g.numel(), g.dtype, g.device).view(g.shape).copy_(g)
        adam(
            [out],
            [g],
            [m],
            [slots["v"]],
            [],
            [slots["t"]],
            fused=True,
            maximize=False,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=-1.0,
            weight_decay=0.0,
            eps=self.eps,
        )
        if self.clip_rms:
            self._clip(out)
        return out

    def _clip(self, u: Tensor) -> None:
        limit = self.clip_rms * math.sqrt(u.numel())
        norm = torch.linalg.vector_norm(u)
        if u.device.type != "cpu":
            u.mul_((limit / norm).clamp_(max=1.0))  # no wait for the device
        elif float(norm) > limit:
            u.mul_(limit / float(norm))


def default_direction() -> Adam:
    """The default of ``target = "update"``."""
    return Adam(beta1=UPDATE_BETA1, clip_rms=UPDATE_CLIP_RMS)
