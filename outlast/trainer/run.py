"""What the loop works with: the parts of one run on one rank, joined."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from outlast.checkpoint import Checkpointer, Restored
from outlast.diagnostics import Heartbeat, Recorder
from outlast.errors import StateMismatch
from outlast.events import EvalDone, EventLog, StepDone
from outlast.launch import Place
from outlast.trainer.checkpoint_schedule import Schedule
from outlast.trainer.config import Config
from outlast.trainer.data import Loader
from outlast.trainer.engine import Engine
from outlast.trainer.progress import Progress
from outlast.trainer.rng import load_rng_state, rng_state
from outlast.trainer.run_directory import Attempt

_LOG = logging.getLogger("outlast")


@dataclass(slots=True)
class Run:
    """The parts, and the small acts between them. Every method that says so is collective."""

    config: Config
    place: Place
    attempt: Attempt
    engine: Engine
    loader: Loader
    held_out: Loader
    checkpointer: Checkpointer
    schedule: Schedule
    recorder: Recorder
    heartbeat: Heartbeat
    events: EventLog
    progress: Progress
    first_step: int = 1
    last_step: int = field(init=False)
    _durable: bool = True
    """Whether the checkpoint that is due is to reach storage."""

    def __post_init__(self) -> None:
        self.last_step = self.config.trainer.steps

    def begin(self, step: int) -> None:
        """Tell those who watch that ``step`` begins."""
        self.recorder.step = step
        self.heartbeat.beat("step", step)

    def evaluation_due(self, step: int) -> bool:
        """Whether held-out loss is to be measured after ``step``."""
        every = self.config.trainer.eval_every_steps
        return step == self.last_step or (every > 0 and step % every == 0)

    def evaluate(self, step: int) -> None:
        """Measure held-out loss over all ranks; collective."""
        start_s = time.perf_counter()
        self.heartbeat.beat("eval", step)
        batches = [
            pair for number in range(self.config.trainer.eval_batches) for pair in self.held_out.batches(number + 1)
        ]
        mean = self.engine.evaluate(batches)
        token = self.recorder.enter("all_reduce", mean.nbytes, "held-out loss")
        dist.all_reduce(mean)
        total = float(mean)  # with NCCL the collective is over only now
        self.recorder.complete(token)
        loss = total / self.place.world_size
        self.events.write(EvalDone(step=step, loss=loss, seconds=time.perf_counter() - start_s))
        if self.place.rank == 0:
            _LOG.info("step %d: held-out loss %.4f", step, loss)

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is to be begun after ``step``, in whatever tier.

        Collective with ``checkpoint.every_steps = "auto"``.
        """
        self._durable = step == self.last_step or self.schedule.due(step, saving=self.checkpointer.running)
        memory = self.config.checkpoint.memory_every_steps
        return self._durable or (memory > 0 and step % memory == 0)

    def wait_copied(self, step: int) -> None:
        """Wait until the last snapshot no longer needs the live tensors; raises SnapshotMutated if one was changed."""
        self.heartbeat.beat("checkpoint", step)
        self.checkpointer.wait_copied()
        self.heartbeat.beat("step", step)

    def save(self, step: int) -> None:
        """Begin a checkpoint of the state after ``step``; the files are written while training goes on."""
        self.heartbeat.beat("checkpoint", step)
        state = self.engine.state()
        replicated = {**state.replicated, "data": self.loader.state()}
        local: dict[str, Any] = {**state.local, "rng": rng_state()}
        eager = state.eager | {"rng"}
        self.checkpointer.save(step, replicated=replicated, local=local, eager=eager, durable=self._durable)

    def note(self, done: StepDone) -> None:
        """Tell what a step was like, and learn from it when checkpoints are due."""
        self.events.write(done)
        self.progress.step(done)
        self.schedule.note(done, saving=self.checkpointer.running)

    def restore(self, resume: str) -> Restored | None:
        """Go on from a checkpoint, if there is one; collective.

        On another number of ranks than saved it, the data go on with the first window that no step has seen, what the
        exchange of gradients keeps is redistributed, and ranks that there were not before draw fresh random numbers.

        Args:
            resume: ``auto`` or the number of a step.

        Raises:
            CheckpointError, DataError: see :meth:`Checkpointer.restore`, :meth:`Loader.check`.
        """
        restored = self.checkpointer.restore("auto" if resume == "auto" else int(resume), any_world_size=True)
        if restored is None:
            return None
        if restored.step > self.last_step:
            raise StateMismatch(
                f"the newest checkpoint is of step {restored.step}, training ends at step {self.last_step}",
                f"raise trainer.steps, or name an earlier checkpoint with --resume STEP (at most {self.last_step})",
            )
        rank, ranks = self.place.rank, restored.world_size
        same = ranks == self.place.world_size
        self.loader = self.loader.going_on(restored.replicated["data"], restored.step, other_ranks=not same)

        def read_local(number: int) -> dict[str, Any]:
            return restored.local if same and number == rank else restored.read_local(number)

        self.engine.load(restored.replicated, read_local, ranks)
        if rank < ranks:
            load_rng_state(read_local(rank)["rng"])
        self.first_step = restored.step + 1
        if not same and rank == 0:
            _LOG.info(
                "step %d was saved by %d ranks, %d go on; a step now takes %d windows of the text",
                restored.step,
                ranks,
                self.place.world_size,
                self.loader.windows_per_step,
            )
        return restored

    def finish(self) -> None:
        """Wait until the last checkpoint is committed (or has failed), and for all ranks; collective."""
        self.heartbeat.beat("finish", self.last_step)
        self.checkpointer.close()
        token = self.recorder.enter("barrier", 0, "end of the run")
        dist.barrier()
        self.recorder.complete(token)
