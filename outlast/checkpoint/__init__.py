"""State that survives: asynchronous snapshots, committed in two phases, verified when read.

A checkpoint is a Zarr v3 group that stock ``zarr`` opens::

    zarr.open_group("runs/stdlib_gpt/checkpoints/step_00000200", mode="r")["model"]["token.weight"]

One array a tensor, but for small ones, which lie packed in arrays of bytes with an index; CRC32C in every chunk and in
the votes, JSON for everything else, no pickle. A step is a checkpoint if and only if it has a valid commit record;
there is no pointer to the latest one that could be wrong.

Reading one, beside the run that saves there, or with other ranks, or none: :func:`outlast.checkpoint.load`.
Looking at checkpoints needs no ranks: :mod:`outlast.checkpoint.tools`. Other formats:
:mod:`outlast.checkpoint.convert`.
"""

from outlast.checkpoint.attach import attach
from outlast.checkpoint.auto_interval import AutoInterval, Interval, expected_mtbf_s, optimal_interval_s
from outlast.checkpoint.checkpointer import Checkpointer
from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.load import load
from outlast.checkpoint.restore.load import Restored
from outlast.checkpoint.state.matching import Mismatch
from outlast.checkpoint.state.tree import check_like
from outlast.lazy import lazy_modules

__all__ = [
    "AutoInterval",
    "CheckpointConfig",
    "Checkpointer",
    "Interval",
    "Mismatch",
    "Restored",
    "attach",
    "check_like",
    "expected_mtbf_s",
    "load",
    "optimal_interval_s",
]

__getattr__ = lazy_modules(__name__, ["convert", "deepspeed", "rng", "tools"])
