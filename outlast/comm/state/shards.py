"""One parameter of a sharded model: how it is cut, and its error-feedback state on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outlast.comm.buffers import scratch
from outlast.comm.compressors import Shape, Slots
from outlast.comm.compressors.base import numel_of
from outlast.comm.direction import Direction
from outlast.comm.feedback import Feedback
from outlast.comm.feedback.layout import of_slice, slice_of
from outlast.comm.slices import Cut
from outlast.comm.state.slots import MOMENT, OWNED, Form, Forms, SlotSchema, forms_of, prefixed, split


@dataclass(slots=True, eq=False)
class ShardedParam:
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
    """The slice of each rank; a single one where every rank decodes the whole."""
    own: int
    """Which of the cuts this rank decodes."""
    local: Slots | None = None
    """This rank's slots of the whole; None until the first gradient. Each slice has its own compressor memory."""
    owned: Slots | None = None
    """The method's replicated slots, of this rank's slice."""
    moments: dict[int, Slots] = field(default_factory=dict)
    """The direction's slots of each slice: of this rank's gradient where it is compressed, else of the mean, and then
    of this rank's slice alone."""

    @property
    def own_shape(self) -> Shape:
        """The shape of the slice that this rank decodes."""
        return self.cuts[self.own].shape

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

    def direction_of(self, direction: Direction, index: int, g: Tensor) -> Tensor:
        """The direction of slice ``index``, whose gradient is ``g``; valid until the next call in this thread."""
        if index not in self.moments:
            self.moments[index] = direction.start(g)
        out = scratch("direction", g.numel(), g.dtype, g.device).view(g.shape)
        return direction.move(self.moments[index], g, out)

    def owner_slots(self, feedback: Feedback) -> Slots:
        """The owned slots, made when they are first needed."""
        if self.owned is None:
            like = torch.zeros(self.own_shape, dtype=self.dtype, device=self.device)
            self.owned = feedback.new_replicated(like)
        return self.owned

    def saved(self) -> Slots:
        """Its slots, live, as a state dict names them."""
        slots = dict(self.local or {}) | prefixed(OWNED, self.owned)
        for index, moments in self.moments.items():
            slots |= prefixed(MOMENT, {of_slice(slot, index): tensor for slot, tensor in moments.items()})
        return slots

    def load(self, slots: Slots) -> None:
        """Adopt slots that fit :meth:`schema`."""
        own, owned, moments = split(slots)
        self.local, self.owned, self.moments = own or None, owned or None, {}
        for name, tensor in moments.items():
            slot, index = slice_of(name)
            self.moments.setdefault(index, {})[slot] = tensor

    def schema(self, feedback: Feedback | None, direction: Direction | None) -> SlotSchema:
        """What its slots must be. Before its first gradient it has none, and without gradients it never gets any."""
        cpu = torch.device("cpu")
        forms: Forms = {}
        compressed = feedback is not None and self.compress
        if feedback is not None and compressed:
            forms |= dict.fromkeys(feedback.own_slots, Form(self.shape, self.dtype))
            for index, cut in enumerate(self.cuts):
                apart = forms_of(feedback.new_apart(cut.shape, self.dtype, cpu))
                forms |= {of_slice(slot, index): form for slot, form in apart.items()}
            if numel_of(self.own_shape):
                owned = dict.fromkeys(feedback.replicated_slots, Form(self.own_shape, self.dtype))
                forms |= prefixed(OWNED, owned)
        if direction is not None:
            for index, cut in enumerate(self.cuts):
                if numel_of(cut.shape) and (compressed or index == self.own):
                    moments = forms_of(direction.start(torch.zeros(cut.shape, dtype=self.dtype)))
                    forms |= prefixed(MOMENT, {of_slice(slot, index): form for slot, form in moments.items()})
        return SlotSchema(self.device, local=forms, replicated={}, required=False)
