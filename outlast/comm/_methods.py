"""The method that settings ask for."""

from __future__ import annotations

from outlast.comm.compressors import make_compressor
from outlast.comm.feedback import Feedback
from outlast.comm.feedback import make_feedback as by_name
from outlast.comm.settings import CommConfig


def make_feedback(config: CommConfig) -> Feedback | None:
    """The feedback, with its compressor, that ``config`` asks for; None where everything is sent whole."""
    if config.compressor == "dense":
        return None
    compressor = make_compressor(
        config.compressor,
        density=config.density,
        selection=config.selection,
        rank=config.rank,
        values=config.values,
        block=config.block or None,
    )
    return by_name(config.feedback, compressor, eta=config.eta, residual=config.residual)


def two_phase(config: CommConfig, n: int) -> bool:
    """Whether ``n`` ranks exchange messages in two phases: where it is asked for, or where ``auto`` sends fewer bytes,
    2 (n - 1) / n messages instead of n - 1."""
    return n > 1 and (config.transport == "two-phase" or (config.transport == "auto" and n > 2))
