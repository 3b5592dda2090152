"""Feedback by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outlast.comm.compressors import Compressor
from outlast.comm.config import FEEDBACKS
from outlast.comm.feedback.base import Feedback
from outlast.comm.feedback.econtrol import EControl
from outlast.comm.feedback.ef14 import EF14, NoFeedback
from outlast.comm.feedback.ef21 import EF21, EF21BC, EF21SGDM
from outlast.comm.feedback.ef21pp import EF21PP
from outlast.comm.feedback.ef21w import EF21W
from outlast.config import nearest
from outlast.errors import OutOfRange, UnknownCompressor

METHODS = (*FEEDBACKS, "ef21-w", "ef21-pp")
"""All of them: those that a config can name, and those that take arguments no config has."""


def make_feedback(
    name: str,
    compressor: Compressor,
    *,
    eta: float | None = None,
    second: Compressor | None = None,
    weights: Sequence[float] | None = None,
    residual: str = "full",
) -> Feedback:
    """The method of one of METHODS. A setting that the method does not have is refused.

    Args:
        name: which.
        compressor: of what ranks send.
        eta: ef21-sgdm (weight of the new gradient, default 0.1) and econtrol (strength, default the compressor's
            alpha).
        second: of what owners relay in the two-phase transport; None takes ``compressor``.
        weights: ef21-w: one for each rank, rank 0 first; required.
        residual: ef14: ``full`` or ``int8``.

    Raises:
        UnknownCompressor: no such method; names the nearest one that exists.
        OutOfRange: a setting out of its range, of another method, or missing.
    """
    if name not in METHODS:
        raise UnknownCompressor(f"comm.feedback = {name!r}: there is no such feedback", nearest(name, METHODS))
    for setting, given, owners in (
        ("eta", eta is not None, ("ef21-sgdm", "econtrol")),
        ("weights", weights is not None, ("ef21-w",)),
        ("residual", residual != "full", ("ef14",)),
    ):
        if given and name not in owners:
            raise OutOfRange(f"feedback {name!r} has no {setting}", f"leave it out, or use {' or '.join(owners)}")
    if name == "ef14":
        return EF14(compressor, second, residual=residual)
    if name == "ef21-sgdm":
        return EF21SGDM(compressor, eta, second)
    if name == "econtrol":
        return EControl(compressor, eta, second)
    if name == "ef21-w":
        if weights is None:
            raise OutOfRange("feedback 'ef21-w' has no weights", "give one for each rank, or use ef21")
        return EF21W(compressor, weights, second)
    plain: dict[str, Callable[[Compressor, Compressor | None], Feedback]] = {
        "ef21": EF21,
        "ef21-bc": EF21BC,
        "ef21-pp": EF21PP,
        "none": NoFeedback,
    }
    return plain[name](compressor, second)
