"""Methods whose ranks track their gradients and send the compressed difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Compressor, Message, Slots
from outlast.comm.feedback.base import Feedback
from outlast.comm.feedback.probe import Probe
from outlast.config import require
from outlast.errors import CommError


class EF21(Feedback):
    """Each rank tracks its gradient in h_i and sends the compressed difference. arXiv 2106.05203, algorithm 2. ::

        c_i = C(g_i - h_i)  sent        h_i += c_i        h += mean c_i        x -= gamma h

    from h_i = g_i^0, h = mean h_i (first message dense). Converges with any difference between ranks' data; the
    gradients should be exact or from large batches (else see :class:`EF21SGDM`). Step size and guarantee:
    :func:`outlast.comm.analysis.theory.ef21_step`, :func:`~outlast.comm.analysis.theory.ef21_bound`. Memory: two slots,
    h_i and h.

    In the two-phase transport this is EF21-BC (arXiv 2110.03294): the owner of a slice keeps w = mean h_i, and h
    follows w by compressed differences: ::

        w += mean c_i        d = C'(w - h)  sent        h += d        x -= gamma h

    Deviation: h is replicated on every rank instead of kept by a server.
    """

    name: ClassVar[str] = "ef21"
    own_slots: tuple[str, ...] = ("h_i",)
    replicated_slots: ClassVar[tuple[str, ...]] = ("h",)
    relay_slots: ClassVar[tuple[str, ...]] = ("w",)
    dense_start: ClassVar[bool] = True

    def _own(self, g: Tensor) -> Slots:
        return {"h_i": g.clone()}

    def encode(self, local: Slots, g: Tensor, out: Tensor | None = None, probe: Probe | None = None) -> Tensor:
        return self._track(local, g, g, out, probe)

    def encode_dense(self, local: Slots, g: Tensor) -> Tensor:
        return local["h_i"].copy_(g)

    def _track(self, local: Slots, target: Tensor, g: Tensor, out: Tensor | None, probe: Probe | None) -> Tensor:
        """Send C(target - h_i), and add it to h_i; ``g`` is the gradient that the caller passed."""
        h_i = local["h_i"]
        difference = scratch("difference", h_i.numel(), h_i.dtype, h_i.device).view(h_i.shape)
        torch.sub(target, h_i, out=difference)
        if probe is not None:
            probe.saw_target(difference)
        message = self.compressor.compress(difference, out, local)
        message.add_to(h_i)
        if probe is not None:
            message.add_to(difference, -1.0)
            probe.saw_rest(difference, torch.sub(target, h_i), g, self.share)
        return message.payload

    def _aggregate(self, replicated: Slots, messages: Sequence[Message], out: Tensor) -> None:
        h = replicated["h"]
        self._add(messages, h)
        out.copy_(h)

    def _relay(
        self, owned: Slots, replicated: Slots, messages: Sequence[Message], like: Tensor, out: Tensor | None
    ) -> Tensor:
        w, h = owned["w"], replicated["h"]
        self._add(messages, w)
        difference = scratch("difference", w.numel(), w.dtype, w.device).view(w.shape)
        return self.second.compress(torch.sub(w, h, out=difference), out, owned).payload

    def _receive(self, replicated: Slots, message: Message, out: Tensor) -> None:
        h = replicated["h"]
        message.add_to(h)
        out.copy_(h)


class EF21BC(EF21):
    """EF21 with both directions compressed, optionally by two compressors. arXiv 2110.03294. ::

        c_i = C(g_i - h_i)  sent        h_i += c_i        w += mean c_i
        d = C'(w - h)  sent             h += d            x -= gamma h

    from h_i = g_i^0, h = w = mean h_i (first messages dense). This is what :class:`EF21` does in the two-phase
    transport, under a name that says so. It refuses the all-gather transport, which has no second direction. Rounds
    grow as 1 / (alpha alpha'). Memory: two slots, and w, one slot for a slice.

    Deviation: the server is spread over the ranks, each of which serves one slice and compresses it separately.
    """

    name: ClassVar[str] = "ef21-bc"

    def _aggregate(self, replicated: Slots, messages: Sequence[Message], out: Tensor) -> None:
        raise CommError(
            "ef21-bc compresses on the way back too, but all-gather has no way back",
            "use the two-phase transport, or ef21",
        )


class EF21SGDM(EF21):
    """EF21 of a momentum of the gradient, which suits small batches. arXiv 2305.15155. ::

        v_i = (1 - eta) v_i + eta g_i
        c_i = C(v_i - h_i)  sent        h_i += c_i        h += mean c_i        x -= gamma h

    from v_i = h_i = g_i^0, h = mean h_i (first message dense). In a dense step v_i moves as above, h_i = v_i, and h is
    the mean of the v_i. Two-phase as :class:`EF21`. Memory: three slots, h_i, v_i and h.

    Args:
        compressor: C.
        eta: weight of the new gradient, 0 < eta <= 1, default 0.1; 1 is EF21.
        second: see :class:`Feedback`.

    Raises:
        OutOfRange: eta out of its range.
    """

    name: ClassVar[str] = "ef21-sgdm"
    own_slots: tuple[str, ...] = ("h_i", "v")

    def __init__(self, compressor: Compressor, eta: float | None = None, second: Compressor | None = None) -> None:
        super().__init__(compressor, second)
        self.eta = 0.1 if eta is None else eta
        require(0 < self.eta <= 1, "eta", self.eta, "0 < eta <= 1")

    def _own(self, g: Tensor) -> Slots:
        return {"h_i": g.clone(), "v": g.clone()}

    def encode(self, local: Slots, g: Tensor, out: Tensor | None = None, probe: Probe | None = None) -> Tensor:
        return self._track(local, local["v"].lerp_(g, self.eta), g, out, probe)

    def encode_dense(self, local: Slots, g: Tensor) -> Tensor:
        return local["h_i"].copy_(local["v"].lerp_(g, self.eta))
