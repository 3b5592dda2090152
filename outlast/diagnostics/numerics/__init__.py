"""A run's numbers: values that are not finite, spikes, replicas that differ, drift; and a step again, bit by bit."""

from outlast.diagnostics.numerics.config import NumericsConfig
from outlast.diagnostics.numerics.events import (
    NotFinite,
    NumericsDrift,
    NumericsEvent,
    NumericsSpike,
    ReplicasDifferent,
)
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
