"""Gradients over slow links: compressed, with error feedback that converges, bit-identical on every rank.

``Compressor`` (a tensor to bytes and back) x ``Feedback`` (what happens to what was not sent) x ``Communicator`` (how
messages become a sum). :func:`attach` puts the three under DDP, FSDP2 or DeepSpeed in one call::

    reducer = outlast.comm.attach(ddp, target="gradient", feedback="ef21", density=0.05)

Methods are in :mod:`outlast.comm.compressors` and :mod:`outlast.comm.feedback`, what theory says of them in
:mod:`outlast.comm.analysis`, and checks for a compressor of one's own in :mod:`outlast.comm.testing`.
"""

from outlast.comm.attach import attach
from outlast.comm.auto.policy import Choice
from outlast.comm.config import CommConfig
from outlast.comm.ddp.reducer import GradientReducer
from outlast.comm.exchange.stats import ReduceStats
from outlast.comm.reducer import Reducer
from outlast.comm.transport.communicator import CollectiveObserver, Communicator
from outlast.lazy import lazy_modules

__all__ = [
    "Choice",
    "CollectiveObserver",
    "CommConfig",
    "Communicator",
    "GradientReducer",
    "ReduceStats",
    "Reducer",
    "attach",
]

__getattr__ = lazy_modules(__name__, ["analysis", "compressors", "feedback", "testing"])
