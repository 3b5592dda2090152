"""How to store the local slots of a tensor whose slices are compressed separately.

Slots with the tensor's shape are whole tensors, of which each slice has its rows. Slots with other shapes
(``Feedback.apart_slots``) exist once for each slice, under the name ``slot_00003``. A tensor in one piece has every
slot under its plain name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outlast.comm.compressors import Slots
from outlast.comm.feedback.base import Feedback
from outlast.comm.slices import slices


def of_slice(slot: str, index: int) -> str:
    """The name of ``slot``, one of ``Feedback.apart_slots``, for slice ``index``."""
    return f"{slot}_{index:05d}"


def slice_of(name: str) -> tuple[str, int]:
    """The reverse of :func:`of_slice`."""
    slot, _, index = name.rpartition("_")
    return slot, int(index)


def join(feedback: Feedback, units: Sequence[Slots]) -> Slots:
    """One dict from the local slots of all slices (at least one); copies the tensors unless there is one slice."""
    if len(units) == 1:
        return dict(units[0])
    whole = {slot: torch.cat([unit[slot] for unit in units]) for slot in feedback.own_slots}
    for slot in feedback.apart_slots:
        whole |= {of_slice(slot, index): unit[slot] for index, unit in enumerate(units)}
    return whole


def unit(feedback: Feedback, local: Slots, index: int, units: int) -> Slots:
    """The slots of slice ``index`` of ``units`` in what :func:`join` returned, as views that may be changed in
    place."""
    if units == 1:
        return local
    whole = {slot: slices(local[slot], units)[index] for slot in feedback.own_slots}
    return whole | {slot: local[of_slice(slot, index)] for slot in feedback.apart_slots}
