"""A run's numbers: values that are not finite, and where they come from first."""

from outlast.diagnostics.numerics.config import NumericsConfig
from outlast.diagnostics.numerics.events import (
    NotFinite,
    NumericsDrift,
    NumericsEvent,
    NumericsSpike,
    ReplicasDifferent,
)
from outlast.diagnostics.numerics.watch import NumericsWatch

__all__ = [
    "NotFinite",
    "NumericsConfig",
    "NumericsDrift",
    "NumericsEvent",
    "NumericsSpike",
    "NumericsWatch",
    "ReplicasDifferent",
]
