"""Error feedback: what happens to what was not sent."""

from outlast.comm.feedback.base import Feedback
from outlast.comm.feedback.econtrol import EControl
from outlast.comm.feedback.ef14 import EF14, NoFeedback
from outlast.comm.feedback.ef21 import EF21, EF21BC, EF21SGDM
from outlast.comm.feedback.ef21pp import EF21PP
from outlast.comm.feedback.ef21w import EF21W
from outlast.comm.feedback.make import METHODS, make_feedback
from outlast.comm.feedback.probe import Probe

__all__ = [
    "EF14",
    "EF21",
    "EF21BC",
    "EF21PP",
    "EF21SGDM",
    "EF21W",
    "METHODS",
    "EControl",
    "Feedback",
    "NoFeedback",
    "Probe",
    "make_feedback",
]
