"""What the watch on numbers tells, as events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from outlast.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsEvent(Event):
    """Base class of what the watch tells."""

    step: int
    told: str
    """What it is, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite(NumericsEvent):
    """A step's gradients, or what was to be averaged, are NaN or infinite: each rank writes what all have found. Or the
    loss of a rank is, with gradients that are finite: it writes that."""

    kind: ClassVar[str] = "not_finite"
    ranks: tuple[int, ...]
    """Where it appeared first; empty if that is not known."""
    module: str
    """The first in forward order whose output is not finite; empty if there is none, or it is not known."""
    parameter: str
    """The first in backward order whose gradient is not finite; empty if it is not known."""
    transient: bool
    """Whether the same forward and backward, run again, were finite on all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsSpike(NumericsEvent):
    """A loss or a norm far above what it was: written when it begins, and when it is over or has become the level."""

    kind: ClassVar[str] = "numerics_spike"
    what: str
    """``loss``: of this rank; ``gradient norm`` or ``update norm``: of all ranks, before clipping."""
    value: float
    """The largest since it began."""
    baseline: float
    """The median of the steps before."""
    sigmas: float | None
    """Standard deviations above that; None if the steps before were all the same."""
    first_step: int
    last_step: int
    """The last one in which it was far off."""
    state: str
    """``began``, ``over`` or ``level``: it has lasted, and is compared with itself from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasDifferent(NumericsEvent):
    """Ranks that must hold the same parameters and optimizer state do not; written on each of them, once."""

    kind: ClassVar[str] = "replicas_different"
    ranks: tuple[int, ...]
    """Those that differ from a majority; empty if there is none, as with two."""
    groups: tuple[tuple[int, ...], ...]
    """Ranks that hold the same, the largest group first."""
    parameter: str
    """The first that differs, in the model's order; ``exp_avg of NAME`` is optimizer state."""
    count: int
    """How many tensors differ."""
    equal_at: int | None
    """The last step after which they were the same; None if none is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsDrift(NumericsEvent):
    """A sampled number heads for a limit from which it matters, or has reached it."""

    kind: ClassVar[str] = "numerics_drift"
    what: str
    """``attention logit``, ``log Z`` or ``gradient RMS``."""
    where: str
    """The module or parameter that is nearest to the limit."""
    count: int
    """How many of them there is the same to tell of."""
    value: float
    limit: float
    at_step: int | None
    """When it meets the limit, if it goes on so; None: it has."""


NUMERICS_KINDS = (NotFinite.kind, NumericsSpike.kind, ReplicasDifferent.kind, NumericsDrift.kind)
"""Of the events above."""
