"""A DeepSpeed engine's whole state, for a Checkpointer that saves other state beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist

import outlast.checkpoint.deepspeed
from outlast.checkpoint.deepspeed.files import CHANGING, HEADER
from outlast.checkpoint.state.tree import check_like
from outlast.errors import StateMismatch

State = dict[str, Any]
_BUFFERS = "buffers"


class DeepSpeedState:
    """What a DeepSpeed engine has to go on with, bit for bit; ZeRO 0 to 3. Making one attaches outlast to the engine.

    ::

        state = DeepSpeedState(engine)
        replicated, local = state.collect()
        checkpointer.save(step, replicated=replicated, local=local, eager=state.EAGER)

    Args:
        engine: what ``deepspeed.initialize`` returned.

    Raises:
        MissingDependency, CheckpointError: see :func:`outlast.checkpoint.deepspeed.attach`.
    """

    EAGER: Final = frozenset({CHANGING, _BUFFERS})
    """Top-level keys of what is collected whose tensors the next forward may change."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._attached = outlast.checkpoint.deepspeed.attach(engine)
        self._attached.saved_elsewhere = True

    def before_update(self, wait: Callable[[], object]) -> None:
        """Have ``engine.step`` call this right before it updates anything: ``checkpointer.wait_copied``."""
        self._attached.before_update = wait

    def collect(self) -> tuple[State, State]:
        """The state now, between steps; collective.

        Returns:
            What is equal on all ranks, and what is this rank's own: DeepSpeed's files, each of the rank that would
            write it, and the module's buffers, of which DeepSpeed without ZeRO 3 saves those of rank 0 alone. The
            tensors are live.

        Raises:
            CheckpointError: something in it cannot be stored; names the rank, DeepSpeed's file and the key.
        """
        replicated, local = self._attached.collect()
        if buffers := dict(self._engine.module.named_buffers()):
            local[_BUFFERS] = buffers
        return replicated, local

    def load(self, replicated: Mapping[str, Any], read_local: Callable[[int], Mapping[str, Any]], ranks: int) -> None:
        """Put back what :meth:`collect` returned on each of ``ranks`` ranks; collective.

        Args:
            replicated: what was equal on all ranks.
            read_local: returns what was a rank's own.
            ranks: how many saved. State of ZeRO 1 to 3 stays with their number; of ZeRO 0, new ranks take the buffers
                of rank 0.

        Raises:
            StateMismatch: it was saved without DeepSpeed, with another ZeRO stage, by another number of ranks; or has
                other buffers. Nothing has been loaded then.
            CheckpointError: DeepSpeed does not take it.
        """
        self.check(replicated, ranks)
        rank = dist.get_rank()
        own = read_local(rank).get(_BUFFERS, {}) if rank < ranks else {}
        buffers = dict(self._engine.module.named_buffers())
        if own:
            check_like(own, buffers)
        with tempfile.TemporaryDirectory(prefix="outlast-deepspeed-") as folder:
            step = int(replicated[HEADER]["tag"].rpartition("step")[2])
            self._attached.put_back(folder, step, replicated, read_local)
        with torch.no_grad():
            for name, buffer in buffers.items():
                if name in own:
                    buffer.copy_(own[name])

    def check(self, replicated: Mapping[str, Any], ranks: int) -> None:
        """Whether what was saved can go on here.

        Raises:
            StateMismatch: see :meth:`load`.
        """
        if HEADER not in replicated:
            raise StateMismatch(
                "the checkpoint was not saved under DeepSpeed",
                "go on with what saved it, DDP or FSDP2, or begin a new run",
            )
        stage, now = int(self._engine.zero_optimization_stage()), dist.get_world_size()
        saved_stage = int(replicated[HEADER].get("zero_stage", stage))
        if saved_stage != stage:
            raise StateMismatch(
                f"the checkpoint was saved with ZeRO {saved_stage}, and the engine has ZeRO {stage}, which keeps the "
                "optimizer's state in another way",
                f"set zero_optimization.stage = {saved_stage}, or begin a new run",
            )
        if stage > 0 and ranks != now:
            raise StateMismatch(
                f"the state of DeepSpeed's ZeRO {stage} was saved by {ranks} ranks, and there are {now}: its parts are "
                "not redistributed",
                f"continue with {ranks} ranks; FSDP2 can change their number",
            )

    def close(self) -> None:
        """Give the engine its own checkpoints back; twice is harmless."""
        self._attached.close()
