"""State that survives: asynchronous snapshots, committed in two phases, verified when read.

A checkpoint is a Zarr v3 group that stock ``zarr`` opens::

    zarr.open_group("runs/NAME/checkpoints/step_00000040", mode="r")["model"]["blocks.0.attn.qkv.weight"]

One array a tensor, but for small ones, which lie packed in arrays of bytes with an index; CRC32C in every chunk and in
the votes, JSON for everything else, no pickle. A step is a checkpoint if and only if it has a valid commit record;
there is no pointer to the latest one that could be wrong.
"""

from outlast.checkpoint.attach import attach as attach
from outlast.checkpoint.auto_interval import Interval as Interval
from outlast.checkpoint.auto_interval import Pace as Pace
from outlast.checkpoint.auto_interval import expected_mtbf_s as expected_mtbf_s
from outlast.checkpoint.auto_interval import optimal_interval_s as optimal_interval_s
from outlast.checkpoint.checkpointer import Checkpointer as Checkpointer
from outlast.checkpoint.config import CheckpointConfig as CheckpointConfig
from outlast.checkpoint.convert.convert import Exported as Exported
from outlast.checkpoint.convert.convert import ForeignFormat as ForeignFormat
from outlast.checkpoint.convert.convert import Imported as Imported
from outlast.checkpoint.convert.convert import export_step as export_step
from outlast.checkpoint.convert.convert import import_step as import_step
from outlast.checkpoint.restore.restore import Restored as Restored
from outlast.checkpoint.state.tree import check_like as check_like
from outlast.checkpoint.tools.diff import Comparison as Comparison
from outlast.checkpoint.tools.diff import TensorDifference as TensorDifference
from outlast.checkpoint.tools.diff import ValueDifference as ValueDifference
from outlast.checkpoint.tools.diff import diff as diff
from outlast.checkpoint.tools.inspect import Problem as Problem
from outlast.checkpoint.tools.inspect import StepDescription as StepDescription
from outlast.checkpoint.tools.inspect import StepInfo as StepInfo
from outlast.checkpoint.tools.inspect import TensorInfo as TensorInfo
from outlast.checkpoint.tools.inspect import Verification as Verification
from outlast.checkpoint.tools.inspect import describe as describe
from outlast.checkpoint.tools.inspect import list_steps as list_steps
from outlast.checkpoint.tools.inspect import verify as verify
from outlast.checkpoint.tools.memory import InMemory as InMemory
from outlast.checkpoint.tools.memory import StepInMemory as StepInMemory
from outlast.checkpoint.tools.memory import list_memory as list_memory
from outlast.checkpoint.tools.memory import remove_memory as remove_memory
from outlast.checkpoint.tools.prune import Pruning as Pruning
from outlast.checkpoint.tools.prune import Removal as Removal
from outlast.checkpoint.tools.prune import prune as prune

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
