"""EF21 with ranks that miss steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from outlast.comm.compressors import Message, Slots
from outlast.comm.feedback.ef21 import EF21
from outlast.comm.feedback.probe import Probe


class EF21PP(EF21):
    """EF21 with partial participation: a rank that misses a step keeps its term. arXiv 2110.03294. ::

        c_i = C(g_i - h_i) if rank i takes part, else 0        h_i += c_i        h += mean c_i        x -= gamma h

    from h_i = g_i^0, h = mean h_i (first message dense). The mean is over all n ranks, whoever takes part, so that h
    stays the mean of the h_i: an absent rank counts with the gradient it last reported. If each rank takes part with
    probability p, rounds grow as 1 / (p alpha). Two-phase as :class:`EF21`. Memory: two slots.

    A rank that has no gradient in time passes ``participate=False`` and sends C(0), which decodes to zero for every
    contractive C, since ||C(0) - 0||^2 <= (1 - alpha) 0: payloads keep their size, and no flag is needed. For a rank
    that sends nothing at all, :meth:`~Feedback.decode` and :meth:`~Feedback.relay` take None as its payload. All ranks
    must then agree on who was absent, and the absent rank must not have changed its h_i.
    """

    name: ClassVar[str] = "ef21-pp"

    def encode(
        self,
        local: Slots,
        g: Tensor,
        out: Tensor | None = None,
        probe: Probe | None = None,
        *,
        participate: bool = True,
    ) -> Tensor:
        """See :class:`Feedback`.

        Args:
            local: this rank's slots, moved only if it takes part.
            g: its gradient; for an absent rank only shape, type and device matter.
            out: where the payload is written.
            probe: records nothing for an absent rank.
            participate: whether this rank takes part.
        """
        if participate:
            return super().encode(local, g, out, probe)
        return self.compressor.compress(torch.zeros_like(g), out).payload

    def encode_dense(self, local: Slots, g: Tensor, *, participate: bool = True) -> Tensor:
        """See :class:`Feedback`; an absent rank sends its h_i as it is."""
        return super().encode_dense(local, g) if participate else local["h_i"]

    def _open_all(self, payloads: Sequence[Tensor | None], like: Tensor) -> Sequence[Message]:
        present = iter(super()._open_all([payload for payload in payloads if payload is not None], like))
        return [_Absent(like[:0]) if payload is None else next(present) for payload in payloads]


class _Absent(Message):
    """The message of an absent rank: zero."""

    def add_to(self, out: Tensor, scale: float = 1.0) -> None:
        pass

    def finite(self) -> bool:
        return True
