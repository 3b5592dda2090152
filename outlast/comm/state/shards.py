"""Which slice of each parameter a rank owns, and its share of error-feedback state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Shape, Slots
from outlast.comm.direction import Direction
from outlast.comm.feedback import Feedback


class Cut(NamedTuple):
    """One slice of a tensor: a run of its entries in row-major order."""

    start: int
    stop: int
    shape: Shape
    """With stop - start entries; what the compressor is told of the slice."""


@dataclass(slots=True, eq=False)
class Shards:
    """One parameter's gradient, how it is cut, and its error-feedback state on this rank."""

    name: str
    shape: Shape
    """Of the whole gradient, in the order in which it is cut."""
    dtype: torch.dtype
    """In which it is summed and its slots are kept: float32 or float64."""
    device: torch.device
    compress: bool
    """Whether it is compressed outside warm-up; if not it has no slots."""
    cuts: tuple[Cut, ...]
    """The slice of each rank; one cut alone where every rank decodes the whole."""
    mine: int
    """Which of the cuts this rank decodes."""
    local: Slots | None = None
    """This rank's slots of the whole; None until the first gradient. Compressor memory is apart for each slice."""
    owned: Slots | None = None
    """The method's replicated slots, of this rank's slice."""
    moments: dict[int, Slots] = field(default_factory=dict)
    """The direction's slots of each slice: where it is compressed of this rank's gradient, else of the mean, and then
    of this rank's slice alone."""

    def start(self, feedback: Feedback, parts: Sequence[Tensor]) -> None:
        """Make the local slots from the first gradient, given slice by slice."""
        made = [feedback.start(part) for part in parts]
        self.local = {
            slot: torch.cat([slots[slot].reshape(-1) for slots in made]).view(self.shape) for slot in feedback.own_slots
        }
        for slot in feedback.apart_slots:
            self.local |= {of_slice(slot, index): slots[slot] for index, slots in enumerate(made)}

    def unit(self, feedback: Feedback, index: int) -> Slots:
        """The local slots of one slice, as views."""
        assert self.local is not None
        start, stop, shape = self.cuts[index]
        unit = {slot: self.local[slot].view(-1)[start:stop].view(shape) for slot in feedback.own_slots}
        return unit | {slot: self.local[of_slice(slot, index)] for slot in feedback.apart_slots}

    def direct(self, direction: Direction, index: int, g: Tensor) -> Tensor:
        """The direction of slice ``index``, whose gradient is ``g``; valid until the next call in this thread."""
        if index not in self.moments:
            self.moments[index] = direction.start(g)
        out = scratch("direction", g.numel(), g.dtype, g.device).view(g.shape)
        return direction.move(self.moments[index], g, out)

    def held(self, feedback: Feedback) -> Slots:
        """The owned slots, made when they are first needed."""
        if self.owned is None:
            like = torch.zeros(self.cuts[self.mine].shape, dtype=self.dtype, device=self.device)
            self.owned = feedback.new_replicated(like)
        return self.owned


def of_slice(slot: str, index: int) -> str:
    """The name of a compressor's memory slot of one slice."""
    return f"{slot}_{index:05d}"
