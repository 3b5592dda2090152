"""The parts of one run on one rank, and what the training loop does with them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from outlast.checkpoint import Restored, load
from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.diagnostics.live.step_delays import StepDelays
from outlast.diagnostics.numerics import NumericsWatch
from outlast.errors import CommError, NonFiniteGradient, StateMismatch, TrainingDiverged
from outlast.events import EvalDone, StepDone
from outlast.launch import Notice, Place
from outlast.launch.attempt import Attempt
from outlast.launch.rank_records import RankRecords
from outlast.session.agreement import StepAgreement
from outlast.session.scheduled_checkpoints import Collected, ScheduledCheckpoints
from outlast.trainer.batches import Batch, in_form
from outlast.trainer.config import Config
from outlast.trainer.engines.base import Engine, UpdateStats
from outlast.trainer.progress import Progress
from outlast.trainer.saved_settings import changed_settings, saved_settings
from outlast.trainer.sources import Source

_LOG = logging.getLogger("outlast")


@dataclass(slots=True)
class Run:
    """The parts of a run on this rank. Methods are local unless their docstring says collective."""

    config: Config
    place: Place
    attempt: Attempt
    engine: Engine
    loader: Source
    held_out: Source | None
    checkpoints: ScheduledCheckpoints
    records: RankRecords
    delays: StepDelays
    progress: Progress
    notice: Notice
    agreement: StepAgreement
    numerics: NumericsWatch
    first_step: int = 1
    last_step: int = field(init=False)
    done_step: int = 0
    """The newest step that is done, here or before the run was resumed."""
    ending: bool = False
    """Whether a notice came: the state after ``done_step`` is saved, and the run ends. The same on all ranks."""

    def __post_init__(self) -> None:
        self.last_step = self.config.trainer.steps

    def begin_step(self, step: int) -> None:
        """Announce ``step`` to the recorder and in the heartbeat."""
        self.records.recorder.step = step
        self.numerics.begin_step(step)
        self.delays.forget()
        self.records.heartbeat.beat("step", step)

    def forward_backward(self, step: int, batches: list[Batch]) -> float:
        """See :class:`Engine`; an error about what is not finite says where it comes from."""
        with self._explained(step):
            return self.engine.forward_backward(step, batches)

    def update(self, step: int) -> UpdateStats:
        """See :class:`Engine`; an error about what is not finite says where it comes from.

        Raises:
            ReplicasDiffer: replicas are not the same, and ``numerics.replicas_action`` is ``stop``.
        """
        with self._explained(step):
            done = self.engine.update(step)
        self.numerics.after_update()
        self.numerics.compare_if_due(step)  # before anything is saved
        return done

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (NonFiniteGradient, TrainingDiverged) as error:  # which all ranks raise alike
            raise self.numerics.explained(error, step) from error

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after ``step``."""
        every = self.config.trainer.eval_every_steps
        return not self.ending and (step == self.last_step or (every > 0 and step % every == 0))

    def ask_notice(self) -> None:
        """Begin to ask all ranks whether a notice came. Collective, as :meth:`answer_notice`."""
        self.agreement.ask()

    def answer_notice(self) -> None:
        """Set ``ending`` if a notice came to any rank. Raises CommError, within the group's timeout, if one is lost."""
        token = self.records.recorder.enter("all_reduce", 40, "notice")
        self.ending = self.agreement.answer()
        self.records.recorder.complete(token)

    @property
    def ended_by(self) -> str:
        """Why the run ends before its last step; empty if it does not."""
        if not self.ending or self.done_step >= self.last_step:
            return ""
        return f"notice ({self.notice.name or 'on another node'})"

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss, the mean over all ranks. A notice cuts it off.

        Collective: raises CommError within the process group's timeout when a peer is lost.
        """
        if self.held_out is None:
            return
        start_s = time.perf_counter()
        mean = self.engine.evaluate(self._held_out_batches(step))
        if self.ending:
            if self.place.rank == 0:
                _LOG.info("step %d: the evaluation is cut off by a notice", step)
            return
        token = self.records.recorder.enter("all_reduce", mean.nbytes, "held-out loss")
        try:
            dist.all_reduce(mean)
            total = float(mean)  # with NCCL the collective is over only now
        except RuntimeError as error:
            what = "all_reduce of the held-out loss"
            raise CommError.of_lost_peer(what, self.place.rank, self.place.world_size, error) from error
        self.records.recorder.complete(token)
        loss = total / self.place.world_size
        self.records.events.write(EvalDone(step=step, loss=loss, seconds=time.perf_counter() - start_s))
        if self.place.rank == 0:
            _LOG.info("step %d: held-out loss %.4f", step, loss)

    def _held_out_batches(self, step: int) -> Iterator[Batch]:
        """Each batch is a sign of life, so that a long evaluation is no hang. After a notice there are no more."""
        self.records.heartbeat.beat("eval", step)
        assert self.held_out is not None
        held_out = self.held_out.fresh()
        for number in range(self.config.trainer.eval_batches):
            for pair in held_out.batches(number + 1):
                self.ask_notice()
                yield in_form(pair, self.config.data.form)
                self.records.heartbeat.beat("eval", step)
                self.answer_notice()
                if self.ending:
                    return

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of ``step``; waiting for them is a phase of its own."""
        self.records.heartbeat.beat("data", step)
        batches = [in_form(pair, self.config.data.form) for pair in self.loader.batches(step)]
        self.records.heartbeat.beat("step", step)
        if step == self.first_step and self.place.world_size > 1 and (stream := self.loader.local_state()):
            token = self.records.recorder.enter("all_reduce", 8, "first batches")
            same = self.agreement.all_equal(int(stream["digest"]))
            self.records.recorder.complete(token)
            if same and self.place.rank == 0:
                _LOG.warning("all ranks take the same batches: have data.factory share them out by rank and world_size")
        return batches

    def wait_copied(self, step: int) -> None:
        """Wait until the last snapshot is copied, so that parameters may change.

        Raises:
            SnapshotMutated: a tensor changed before it was copied.
        """
        self.records.heartbeat.beat("checkpoint", step)
        self.checkpoints.checkpointer.wait_copied()
        self.records.heartbeat.beat("step", step)

    def save_if_due(self, step: int) -> None:
        """Begin to save the state after ``step`` if that is due; it is copied and written while training goes on.

        The live tensors may be read, but must not change before :meth:`wait_copied` returns. Collective with
        ``checkpoint.every_steps = "auto"``.
        """
        self.checkpoints.save_if_due(step, self.collect, last=self.ending or step == self.last_step)

    def collect(self, step: int) -> Collected:
        """The state after ``step``, as it is saved."""
        self.records.heartbeat.beat("checkpoint", step)
        state = self.engine.state()
        replicated = {**state.replicated, "data": self.loader.state(), "settings": saved_settings(self.config)}
        local: dict[str, Any] = {**state.local, "rng": rng_state()}
        if stream := self.loader.local_state():
            local["stream"] = stream
        return Collected(replicated, local, state.eager | {"rng", "stream"})

    def record_step(self, done: StepDone) -> None:
        """Write a step's event, log it, and let the checkpoint schedule learn from it."""
        self.done_step = done.step
        self.delays.end_step(done.step, done.step_s, data_s=done.data_s)
        self.records.events.write(done)
        norm = done.grad_norm if done.update_norm is None else done.update_norm
        self.numerics.end_step(done.loss, norm, "gradient" if done.update_norm is None else "update")
        self.progress.step(done)
        self.checkpoints.note_step(done)

    def begin_from(self) -> Restored:
        """Take the parameters and buffers of ``run.start_from``, and nothing else. Collective.

        Returns:
            The step that they are of; ``not_taken`` names the tensors that do not fit.

        Raises:
            CheckpointError: see :func:`outlast.checkpoint.load`; a :class:`StateMismatch` says which setting helps.
        """
        run, model = self.config.run, self.engine.model
        assert run.start_from is not None
        tensors = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        try:
            return load(
                run.start_from,
                "newest" if run.start_step is None else run.start_step,
                parts=("model",),
                into={"model": tensors},
                strict=run.start_strict,
                cast=True,
            )
        except StateMismatch as error:
            fix = "set run.start_strict = false to take what fits, or choose the settings of the model that was saved"
            raise StateMismatch(f"run.start_from: {error.what}", fix) from error

    def restore(self, resume: str) -> Restored | None:
        """Restore a checkpoint, if there is one. Collective; see :meth:`Checkpointer.restore` for its failure contract.

        If the world size changed, the data continue with the first window that no step has seen, error-feedback state
        is redistributed, and additional ranks start with freshly seeded generators.

        Args:
            resume: ``auto`` or the number of a step.

        Returns:
            The restored checkpoint, or None if there is none and ``resume`` is ``auto``.

        Raises:
            CheckpointError, DataError: see :meth:`Checkpointer.restore` and :meth:`Loader.resumed_from`.
        """
        restored = self.checkpoints.read("auto" if resume == "auto" else int(resume), self.engine.like())
        if restored is None:
            return None
        if restored.step > self.last_step:
            raise StateMismatch(
                f"the newest checkpoint is of step {restored.step}, but training ends at step {self.last_step}",
                f"raise trainer.steps, or resume from an earlier step with --resume STEP (at most {self.last_step})",
            )
        # Checkpoints of earlier versions do not say with which settings they were trained.
        changed = changed_settings(restored.replicated.get("settings", {}), self.config, restored.step)
        rank, ranks = self.place.rank, restored.world_size
        same = ranks == self.place.world_size
        stream = restored.local.get("stream")
        self.loader = self.loader.resumed_from(restored.replicated["data"], restored.step, stream)
        self.engine.load(restored.replicated, restored.read_local, ranks)
        if rank < ranks:
            load_rng_state(restored.read_local(rank)["rng"])
        self.first_step = restored.step + 1
        self.done_step = restored.step
        for line in changed if rank == 0 else ():
            _LOG.info("changed since step %d: %s", restored.step, line)
        if not same and rank == 0:
            _LOG.info(
                "step %d was saved by %d ranks and continues on %d; a step now takes %s windows of the text",
                restored.step,
                ranks,
                self.place.world_size,
                self.loader.state().get("windows_per_step"),
            )
        return restored

    def finish(self) -> None:
        """Wait until the last checkpoint is committed or has failed, and then for all ranks. Collective.

        The state is saved first unless it is in storage. Whether the last save failed is told later, since reports come
        first.
        """
        self.checkpoints.save_last(self.done_step, self.collect)
        self.records.heartbeat.beat("finish", self.done_step)
        self.checkpoints.close()
        token = self.records.recorder.enter("barrier", 0, "end of the run")
        dist.barrier()
        self.records.recorder.complete(token)
