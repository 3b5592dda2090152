"""Accelerate shards only on accelerators; with this it does on ranks that have a CPU, in the same way."""

from __future__ import annotations

import warnings
from typing import Any


def shard(rank: int) -> None:
    """FSDP is what Accelerate is asked for; without this it becomes DDP on CPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def as_on_gpus(self: Any, *args: Any, **settings: Any) -> None:
        if settings.get("fsdp_plugin") is not None:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **settings)

    AcceleratorState.__init__ = as_on_gpus
    warnings.simplefilter("default")


def deepspeed(rank: int) -> None:
    """DeepSpeed's ranks are found over gloo; without this Accelerate sees one rank."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from tests.comm.deepspeed.test_deepspeed import load

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    load(rank)
