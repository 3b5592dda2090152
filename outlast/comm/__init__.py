"""Gradients over slow links: compressed, with error feedback that converges, bit-identical on every rank.

``Compressor`` (a tensor to bytes and back) x ``Feedback`` (what becomes of what was not sent) x ``Communicator`` (how
messages become a sum); :class:`GradientReducer` puts the three under DDP or a bare optimizer. In one line::

    reducer = outlast.comm.attach(ddp, feedback="ef21", density=0.05)
"""

from outlast.comm.auto.policy import Choice
from outlast.comm.compressors import (
    BlockTopK,
    Compressor,
    Dense,
    DenseMessage,
    Gear,
    Int4,
    Int8,
    LowRank,
    Message,
    Natural,
    RandK,
    Shape,
    Sign,
    Slots,
    SparseMessage,
    Sum,
    TopK,
    make_compressor,
)
from outlast.comm.config import CommConfig
from outlast.comm.ddp.attach import attach
from outlast.comm.ddp.reducer import GradientReducer
from outlast.comm.direction import Adam, Direction
from outlast.comm.exchange.stats import ReduceStats
from outlast.comm.feedback import EF14, EF21, EF21BC, EF21PP, EF21SGDM, EF21W, EControl, Feedback, NoFeedback, Probe
from outlast.comm.feedback.from_config import make_feedback
from outlast.comm.transport.communicator import CollectiveObserver, Communicator

__all__ = [
    "EF14",
    "EF21",
    "EF21BC",
    "EF21PP",
    "EF21SGDM",
    "EF21W",
    "Adam",
    "BlockTopK",
    "Choice",
    "CollectiveObserver",
    "CommConfig",
    "Communicator",
    "Compressor",
    "Dense",
    "DenseMessage",
    "Direction",
    "EControl",
    "Feedback",
    "Gear",
    "GradientReducer",
    "Int4",
    "Int8",
    "LowRank",
    "Message",
    "Natural",
    "NoFeedback",
    "Probe",
    "RandK",
    "ReduceStats",
    "Shape",
    "Sign",
    "Slots",
    "SparseMessage",
    "Sum",
    "TopK",
    "attach",
    "make_compressor",
    "make_feedback",
]
