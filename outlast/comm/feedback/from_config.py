"""The method that settings ask for."""

from __future__ import annotations

from outlast.comm.compressors import make_compressor
from outlast.comm.config import CommConfig
from outlast.comm.feedback import Feedback, make_feedback


def feedback_from_config(config: CommConfig) -> Feedback | None:
    """The feedback that ``config`` asks for, with its compressor; None if everything is sent whole."""
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
    return make_feedback(config.feedback, compressor, eta=config.eta, residual=config.residual)
