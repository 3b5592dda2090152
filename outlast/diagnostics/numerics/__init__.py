"""A run's numbers: values that are not finite, spikes, replicas that differ, drift; and a step again, bit by bit."""

from typing import TYPE_CHECKING

from outlast.diagnostics.numerics.config import NumericsConfig
from outlast.diagnostics.numerics.events import (
    NotFinite,
    NumericsDrift,
    NumericsEvent,
    NumericsSpike,
    ReplicasDifferent,
)
from outlast.lazy import lazy_modules

if TYPE_CHECKING:
    from outlast.diagnostics.numerics.replay import Replay, StepReplay
    from outlast.diagnostics.numerics.watch import NumericsWatch

__all__ = [
    "NotFinite",
    "NumericsConfig",
    "NumericsDrift",
    "NumericsEvent",
    "NumericsSpike",
    "NumericsWatch",
    "Replay",
    "ReplicasDifferent",
    "StepReplay",
]

# Reports read the events above where there is no torch, and programs are watched that do not import it.
__getattr__ = lazy_modules(__name__, [], held={"NumericsWatch": "watch", "Replay": "replay", "StepReplay": "replay"})
