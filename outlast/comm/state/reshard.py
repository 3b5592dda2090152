"""Error-feedback state of n ranks on m ranks; and what rounding does to state that should be a mean.

What was not sent yet (e: EF14, EControl) adds up in the estimate, and what is tracked (h_i, v) is averaged. So all
estimates to come depend on the mean over ranks alone. That mean is preserved, slot by slot, in float64 until it is
stored::

    residuals   e'_j = (m / n) * sum of e_i over i with i mod m = j             a joiner has 0
    trackers    m > n:  h'_j = h_j                                              a joiner has the mean of all h_i
                m < n:  h'_j = h_j + mean of all h_i - mean of the first m      so that the mean stays

so that sum_j e'_j / m = sum_i e_i / n and sum_j h'_j / m = sum_i h_i / n. With weights (EF21-W) the w_i h_i are summed.
If m = n, and every tensor is cut as before, nothing changes, to the bit. Replicated slots stay as they are.

The slots of slices' owners are joined end to end and cut for the new owners: s and w are means already. A compressor's
memory comes from the rank (or slice) of the same number, or, if there was none, from rank 0 (or the last slice); it
starts afresh if its shape no longer fits. Adam's moments stay with their rank; a joiner gets the mean over ranks. What
is packed in 8 bits is rounded once more, which moves a mean by up to 1/126 of the largest entry of a block.

With ``ranks_per_node`` > 1, n and m count the ranks of an inter-node group, the layouts are those of the slice that
this group exchanges, and old rank i is the group's i-th; the number of ranks in a node must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from outlast.comm.compressors import Shape, Slots
from outlast.comm.compressors.base import numel_of
from outlast.comm.feedback import Feedback
from outlast.comm.feedback.layout import of_slice
from outlast.comm.slices import Cut, cuts, slice_shape
from outlast.comm.state.slots import MOMENT, OWNED
from outlast.errors import CommStateMismatch


class Layout(NamedTuple):
    """How a tensor's gradients are exchanged on a number of ranks.

    Attributes:
        shape: of the tensor.
        dtype: of its slots: float32 or float64.
        pieces: the slice of each rank; a single one, the whole, if every rank decodes everything.
    """

    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Cut, ...]


def in_one(shape: Shape, dtype: torch.dtype = torch.float32) -> Layout:
    """The layout of the all-gather transport."""
    return Layout(tuple(shape), dtype, (Cut(0, numel_of(shape), tuple(shape)),))


def in_rows(shape: Shape, ranks: int, dtype: torch.dtype = torch.float32) -> Layout:
    """The layout of the two-phase transport over ``ranks`` ranks."""
    rows = shape or (1,)
    row = numel_of(rows[1:])
    pieces = [
        Cut(start * row, stop * row, slice_shape(shape, index, ranks))
        for index, (start, stop) in enumerate(cuts(rows[0], ranks))
    ]
    return Layout(tuple(shape), dtype, tuple(pieces))


def reshard(
    layouts: Mapping[str, tuple[Layout, Layout]],
    read: Callable[[int], Mapping[str, Slots]],
    n: int,
    m: int,
    rank: int,
    feedback: Feedback,
    new_feedback: Feedback | None = None,
    replicated: Mapping[str, Slots] | None = None,
) -> dict[str, Slots]:
    """Local (and owned) slots of ``rank`` of ``m`` ranks, from those of ``n`` ranks. Not a collective call.

    Args:
        layouts: of each parameter that has slots: on the n ranks, and on the m ranks.
        read: given an old rank, its slots by the parameter's name, as :mod:`outlast.comm.state.slots` names them.
            Called once for each old rank that matters, in order; what it returns is neither kept nor changed. Residuals
            alone need the old ranks with i mod m = rank; trackers and joiners need all of them.
        n: the old world size.
        m: the new world size.
        rank: which of the m ranks.
        feedback: the method as it ran on n ranks.
        new_feedback: as it will run on m ranks, if it is another instance (weights); of the same kind.
        replicated: replicated slots by the parameter's name; needed only to leave the two-phase transport for
            all-gather with a method that has some, which then begins with mean h_i = h.

    Returns:
        By the parameter's name, as ``read`` returns them; new tensors.

    Raises:
        CommStateMismatch: slots are missing, or of another shape than the layout says.
    """
    new_feedback = new_feedback or feedback
    joins = rank >= n
    moved = {
        name: _Moved(name, before, after, n, m, rank, feedback, new_feedback)
        for name, (before, after) in layouts.items()
    }
    trackers = any(slot not in feedback.residual_slots for slot in feedback.own_slots)
    everyone = joins or (trackers and m < n) or any(one.changes_transport for one in moved.values())
    for i in range(n):
        if not (everyone or i % m == rank or any(one.overlaps(i) for one in moved.values())):
            continue
        slots = read(i)
        for name, one in moved.items():
            if name not in slots:
                raise CommStateMismatch(f"error-feedback state of {name!r} is missing on rank {i} of {n}", _FIX)
            one.take(i, slots[name])
    return {name: one.slots((replicated or {}).get(name)) for name, one in moved.items()}


_FIX = "continue from a checkpoint with the state of all ranks, or start a new run"


class _Moved:
    """One parameter's slots, collected from the old ranks."""

    def __init__(
        self,
        name: str,
        before: Layout,
        after: Layout,
        n: int,
        m: int,
        rank: int,
        feedback: Feedback,
        new_feedback: Feedback,
    ) -> None:
        self.name, self.before, self.after = name, before, after
        self.n, self.m, self.rank = n, m, rank
        self.feedback, self.new_feedback = feedback, new_feedback
        self.same = n == m and before == after and feedback is new_feedback
        self.changes_transport = (len(before.pieces) == 1) != (len(after.pieces) == 1)
        self.kept: Slots = {}
        """Slots of the rank's predecessor, unchanged."""
        self.residuals: Slots = {}
        self.own: Slots = {}
        self.all: Slots = {}
        """Sums over all old ranks."""
        self.survivors: Slots = {}
        self.moments: Slots = {}
        self.owned: Slots = {}
        """Owned slots of the whole tensor, flat."""
        self.owner_memory: dict[int, Slots] = {}

    def overlaps(self, i: int) -> bool:
        """Whether old rank ``i`` owns something of the new slice."""
        if len(self.before.pieces) == 1 or len(self.after.pieces) == 1:
            return False
        old, new = self.before.pieces[i], self.after.pieces[self.rank]
        return old.start < new.stop and new.start < old.stop

    def take(self, i: int, slots: Slots) -> None:
        """Add the slots of old rank ``i``."""
        predecessor = self.rank if self.rank < self.n else 0
        if i == predecessor:
            self.kept = {slot: tensor.clone() for slot, tensor in slots.items()}
        if self.same:
            return
        method = self.feedback.of_rank(i)
        for slot, whole in self._own(method, slots).items():
            if slot in self.feedback.residual_slots:
                if i % self.m == self.rank:
                    _add(self.residuals, slot, whole)
                continue
            weighted = whole.to(torch.float64) * method.share
            _add(self.all, slot, weighted)
            if i < self.m:
                _add(self.survivors, slot, weighted)
            if i == self.rank:
                self.own[slot] = weighted
        for slot, tensor in slots.items():
            if slot.startswith(MOMENT):
                _add(self.moments, slot, tensor)
            elif slot.startswith(OWNED):
                self._take_owned(i, slot.removeprefix(OWNED), tensor)

    def slots(self, replicated: Slots | None) -> Slots:
        """The new rank's slots."""
        if self.same:
            return self.kept
        method = self.new_feedback.of_rank(self.rank)
        own = {slot: self._residual(slot) for slot in self.feedback.residual_slots} | {
            slot: self._tracker(slot, replicated) / method.share for slot in self.all
        }
        result = self._laid_out(method, {slot: t.to(self.after.dtype) for slot, t in own.items()})
        return result | self._moments() | self._owned_slots(own)

    def _own(self, method: Feedback, slots: Slots) -> Slots:
        """The method's slots of the whole tensor, flat."""
        pieces, parts = self.before.pieces, []
        for index, piece in enumerate(pieces):
            unit = {}
            for slot in method.own_slots:
                tensor = self._require(slots, slot).reshape(-1)
                if tensor.numel() != numel_of(self.before.shape):
                    raise CommStateMismatch(
                        f"error-feedback state {slot!r} of {self.name!r} has {tensor.numel()} entries, "
                        f"expected {numel_of(self.before.shape)}",
                        _FIX,
                    )
                unit[slot] = tensor[piece.start : piece.stop].view(piece.shape)
            for slot in method.apart_slots:
                unit[slot] = self._require(slots, slot if len(pieces) == 1 else of_slice(slot, index))
            parts.append(method.unpack(unit, piece.shape, self.before.dtype))
        return {slot: torch.cat([part[slot].reshape(-1) for part in parts]) for slot in parts[0]}

    def _require(self, slots: Slots, slot: str) -> Tensor:
        if slot not in slots:
            raise CommStateMismatch(f"error-feedback state of {self.name!r} has no {slot!r}", _FIX)
        return slots[slot]

    def _residual(self, slot: str) -> Tensor:
        total = self.residuals.get(slot)
        if total is None:
            total = torch.zeros(numel_of(self.after.shape), dtype=torch.float64, device=self._device())
        total = total * (self.m / self.n)
        if self.changes_transport and "s" in self.owned:
            total = total + self.owned["s"]  # what owners held back of the mean, in full on every rank
        return total

    def _tracker(self, slot: str, replicated: Slots | None) -> Tensor:
        mean = self.all[slot] / self.n
        staying = min(self.n, self.m)
        target = mean
        if slot == "h_i" and self.changes_transport and len(self.after.pieces) == 1:
            if replicated is None or "h" not in replicated:
                raise CommStateMismatch(
                    f"{self.name!r}: leaving the two-phase transport needs the replicated slot h", _FIX
                )
            target = replicated["h"].reshape(-1).to(torch.float64)
        if slot not in self.own:
            return target
        if staying < self.n or target is not mean:
            return self.own[slot] + target - self.survivors[slot] / staying
        return self.own[slot]

    def _laid_out(self, method: Feedback, own: Slots) -> Slots:
        """From the method's whole slots, flat, those of a rank's state, with the compressor's memory."""
        pieces = self.after.pieces
        result: Slots = {}
        packed: list[Slots] = []
        for index, piece in enumerate(pieces):
            unit = {slot: t[piece.start : piece.stop].view(piece.shape).contiguous() for slot, t in own.items()}
            packed.append(method.pack(unit) | self._memory(method, index, piece))
        for slot in method.own_slots:
            result[slot] = torch.cat([unit[slot].reshape(-1) for unit in packed]).view(self.after.shape)
        for slot in method.apart_slots:
            for index, unit in enumerate(packed):
                result[slot if len(pieces) == 1 else of_slice(slot, index)] = unit[slot]
        return result

    def _memory(self, method: Feedback, index: int, piece: Cut) -> Slots:
        memory = method.compressor.new_memory(piece.shape, self.after.dtype, self._device())
        old = len(self.before.pieces)
        for slot, fresh in memory.items():
            kept = self.kept.get(slot if old == 1 else of_slice(slot, min(index, old - 1)))
            if kept is not None and kept.shape == fresh.shape:
                memory[slot] = kept.clone()
        return memory

    def _take_owned(self, i: int, slot: str, tensor: Tensor) -> None:
        whole = len(self.before.pieces) == 1
        piece = self.before.pieces[0 if whole else i]
        if slot not in (*self.feedback.relay_slots, *self.feedback.replicated_slots):
            self.owner_memory.setdefault(i, {})[slot] = tensor.clone()
            return
        if tuple(tensor.shape) != tuple(piece.shape):
            raise CommStateMismatch(
                f"error-feedback state {OWNED + slot!r} of {self.name!r} on rank {i} is {tuple(tensor.shape)}, "
                f"expected {tuple(piece.shape)}",
                _FIX,
            )
        if slot not in self.owned:
            self.owned[slot] = torch.zeros(numel_of(self.before.shape), dtype=self.before.dtype, device=tensor.device)
        self.owned[slot][piece.start : piece.stop] = tensor.reshape(-1)

    def _owned_slots(self, own: Slots) -> Slots:
        pieces = self.after.pieces
        piece = pieces[0 if len(pieces) == 1 else self.rank]
        owned = {slot: t for slot, t in self.owned.items() if slot in self.feedback.replicated_slots}
        if len(pieces) > 1:
            owned |= {slot: t for slot, t in self.owned.items() if slot in self.feedback.relay_slots}
            if self.changes_transport and "w" in self.feedback.relay_slots:
                owned["w"] = (self.all["h_i"] / self.n).to(self.after.dtype)
        result = {OWNED + slot: t[piece.start : piece.stop].view(piece.shape).clone() for slot, t in owned.items()}
        if len(pieces) > 1 and (self.owner_memory or (result and self.changes_transport)):
            memory = self.new_feedback.second.new_memory(piece.shape, self.after.dtype, self._device())
            source = self.owner_memory.get(self.rank) or self.owner_memory.get(min(self.owner_memory, default=0), {})
            for slot, fresh in memory.items():
                kept = source.get(slot)
                result[OWNED + slot] = kept if kept is not None and kept.shape == fresh.shape else fresh
        return result

    def _moments(self) -> Slots:
        if self.rank < self.n:
            return {slot: tensor for slot, tensor in self.kept.items() if slot.startswith(MOMENT)}
        return {
            slot: (total / self.n).to(self.kept[slot].dtype).view(self.kept[slot].shape)
            for slot, total in self.moments.items()
        }

    def _device(self) -> torch.device:
        return next((tensor.device for tensor in self.kept.values()), torch.device("cpu"))


def _add(sums: Slots, slot: str, tensor: Tensor) -> None:
    if slot in sums:
        sums[slot].add_(tensor)
    else:
        sums[slot] = tensor.to(torch.float64, copy=True)


def drift(aggregate: Tensor, exact: Tensor) -> float:
    """How far an aggregate has drifted from what it should be: ||aggregate - exact|| / ||exact||; Inf if only the
    latter is 0."""
    off = float(torch.linalg.vector_norm(aggregate - exact))
    size = float(torch.linalg.vector_norm(exact))
    if size:
        return off / size
    return float("inf") if off else 0.0


def tracked(feedback: Feedback, local: Slots) -> Tensor | None:
    """What the other ranks know of a rank's gradient: (n w_i) h_i. Its mean over ranks should be h (or, in the
    two-phase transport, w, whose slices the owners have). None for methods that track nothing. With weights,
    ``feedback`` must be bound to the rank (``Feedback.of_rank``)."""
    return local["h_i"] * feedback.share if "h_i" in local else None


def resync(aggregates: Mapping[str, Tensor], exact: Tensor) -> float:
    """Replace the running mean by the exact one.

    h and the h_i are sums of the same messages in different orders. So they drift apart by rounding, and nothing in the
    method brings them together again. In float32 this is a random walk: 4e-7 after 1000 steps with Top-5 % of Gaussian
    gradients, growing with the root of the number of steps. Now and then, or after a restart, is often enough.

    Args:
        aggregates: the replicated slots of a tensor in the all-gather transport, or the owned slots of a slice in the
            two-phase transport (where h follows w and is not changed).
        exact: the mean over ranks of :func:`tracked` (of the slice), from one dense mean: with the same bits on every
            rank, and of the slots' type.

    Returns:
        The drift before; 0 for methods that track nothing.
    """
    aggregate = aggregates.get("w", aggregates.get("h"))
    if aggregate is None:
        return 0.0
    before = drift(aggregate, exact)
    aggregate.copy_(exact)
    return before


def reshard_all(
    layouts: Mapping[str, tuple[Layout, Layout]],
    old: Sequence[Mapping[str, Slots]],
    m: int,
    feedback: Feedback,
    new_feedback: Feedback | None = None,
    replicated: Mapping[str, Slots] | None = None,
) -> list[dict[str, Slots]]:
    """:func:`reshard` of all ``m`` ranks at once, from the slots of all old ranks."""
    return [
        reshard(layouts, old.__getitem__, len(old), m, rank, feedback, new_feedback, replicated) for rank in range(m)
    ]
