"""State that survives: asynchronous snapshots, committed in two phases, verified when read.

A checkpoint is a Zarr v3 group that stock ``zarr`` opens::

    zarr.open_group("runs/NAME/checkpoints/step_00000040", mode="r")["model"]["blocks.0.attn.qkv.weight"]

One array a tensor, but for small ones, which lie packed in arrays of bytes with an index; CRC32C in every chunk and in
the votes, JSON for everything else, no pickle. A step is a checkpoint if and only if it has a valid commit record;
there is no pointer to the latest one that could be wrong.
"""

from outlast.checkpoint._attach import attach as attach
from outlast.checkpoint._convert import Exported as Exported
from outlast.checkpoint._convert import ForeignFormat as ForeignFormat
from outlast.checkpoint._convert import Imported as Imported
from outlast.checkpoint._convert import export_step as export_step
from outlast.checkpoint._convert import import_step as import_step
from outlast.checkpoint._diff import Comparison as Comparison
from outlast.checkpoint._diff import TensorDifference as TensorDifference
from outlast.checkpoint._diff import ValueDifference as ValueDifference
from outlast.checkpoint._diff import diff as diff
from outlast.checkpoint._in_memory import InMemory as InMemory
from outlast.checkpoint._in_memory import StepInMemory as StepInMemory
from outlast.checkpoint._in_memory import list_memory as list_memory
from outlast.checkpoint._in_memory import remove_memory as remove_memory
from outlast.checkpoint._inspect import Problem as Problem
from outlast.checkpoint._inspect import StepDescription as StepDescription
from outlast.checkpoint._inspect import StepInfo as StepInfo
from outlast.checkpoint._inspect import TensorInfo as TensorInfo
from outlast.checkpoint._inspect import Verification as Verification
from outlast.checkpoint._inspect import describe as describe
from outlast.checkpoint._inspect import list_steps as list_steps
from outlast.checkpoint._inspect import verify as verify
from outlast.checkpoint._interval import expected_mtbf_s as expected_mtbf_s
from outlast.checkpoint._interval import optimal_interval_s as optimal_interval_s
from outlast.checkpoint._pace import Interval as Interval
from outlast.checkpoint._pace import Pace as Pace
from outlast.checkpoint._prune import Pruning as Pruning
from outlast.checkpoint._prune import Removal as Removal
from outlast.checkpoint._prune import prune as prune
from outlast.checkpoint._restoring import Restored as Restored
from outlast.checkpoint._tree import check_like as check_like
from outlast.checkpoint.checkpointer import Checkpointer as Checkpointer
from outlast.checkpoint.settings import CheckpointConfig as CheckpointConfig

__all__ = [
    "CheckpointConfig",
    "Checkpointer",
    "Comparison",
    "Exported",
    "ForeignFormat",
    "Imported",
    "InMemory",
    "Interval",
    "Pace",
    "Problem",
    "Pruning",
    "Removal",
    "Restored",
    "StepDescription",
    "StepInMemory",
    "StepInfo",
    "TensorDifference",
    "TensorInfo",
    "ValueDifference",
    "Verification",
    "attach",
    "check_like",
    "describe",
    "diff",
    "expected_mtbf_s",
    "export_step",
    "import_step",
    "list_memory",
    "list_steps",
    "optimal_interval_s",
    "prune",
    "remove_memory",
    "verify",
]
