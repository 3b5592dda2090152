"""One object that joins the packages for a loop of one's own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.checkpoint import CheckpointConfig
from outlast.diagnostics.numerics import NumericsConfig
from outlast.errors import SessionError, StateMismatch
from outlast.launch import Notice, find_place
from outlast.launch.failures import RESUME_STATUS
from outlast.session import process_group
from outlast.session.agreement import StepAgreement
from outlast.session.checkpoints import SessionCheckpoints
from outlast.session.compression import Comm, attach_reducers
from outlast.session.deepspeed import trained
from outlast.session.models import wrapped
from outlast.session.numerics import SessionNumerics
from outlast.session.place import RunPlace
from outlast.session.settings import Numerics, checkpoint_settings, named, numerics_settings
from outlast.session.state import SessionState
from outlast.session.step_record import StepRecord

Model = nn.Module | Mapping[str, nn.Module]
Optimizers = Optimizer | Mapping[str, Optimizer]


class Session:
    """A training run, for as long as the ``with`` block lasts; every rank makes one, with the same arguments.

    ::

        import outlast

        with outlast.Session("runs/mine", model, optimizer) as session:
            for step in session.steps(1000):
                loss(session.model, step).backward()
                optimizer.step()
                optimizer.zero_grad()

    It joins the process group if the program has not, puts a model that nothing averages into DDP, compresses what
    ranks average, goes on after the newest checkpoint that verifies, saves when it is due, writes the events from which
    ``outlast report`` is made, and obeys a notice of preemption. It works under ``outlast launch``, torchrun, srun and
    mpirun, and as a single process. Constructing it, :meth:`steps`, :meth:`resume` and the end of the block are
    collective over all ranks.

    What is saved: models, optimizers, error feedback, random-number states, and what :meth:`add` names. Checkpoints are
    in the run's directory, or where ``checkpoint`` says; a resumed run goes on bit for bit if batches are a function of
    the step, or come from a loader that was added.

    The block's end: without an exception, the last step is saved unless it is, and nothing is left behind. If a notice
    ended the loop before its last step, the block ends the process with ``SystemExit(75)``, which launchers and the
    Slurm scripts take for "run me again"; what follows the block is not executed then. If the last checkpoint cannot be
    made durable, it raises :class:`NotDurable`.

    Failure contract: when a peer is lost, collectives raise what their backend raises; the session ends with that
    error, and what was saved before stays. What the environment does to a save is reported, and training goes on.

    Args:
        run: the run's directory; None takes the one that ``outlast launch`` has chosen, or ``runs/NAME`` with the
            script's name.
        model: in DDP, sharded with ``fully_shard``, what ``deepspeed.initialize`` returned, or bare; on its device.
            Several go by name, as do their optimizers.
        optimizer: that updates the model; None if the loop updates parameters itself, or DeepSpeed does.
        comm: settings of :class:`CommConfig`, as that or as a dictionary; None takes error feedback that suits the
            optimizer. False leaves averaging to DDP or FSDP2. A single rank sends nothing, whatever is set.
        checkpoint: settings of :class:`CheckpointConfig`; None takes the defaults; False saves nothing.
        numerics: True watches the run's numbers: what is not finite, spikes, replicas that differ; or settings of
            :class:`~outlast.diagnostics.numerics.NumericsConfig`, as that or as a dictionary.
        resume: ``"auto"`` goes on from the newest valid checkpoint if there is one; a step, from that one; ``"never"``
            refuses a directory with a run in it.
        notice_grace_s: seconds that the process has after a notice, where no launcher of outlast's says so; None takes
            no signals.
        timeout_s: limit of the process group, if the session joins it.

    Raises:
        SessionError: an argument, or how the model is wrapped, is not what a session can serve.
        PlaceError, LaunchError: this process's place is not clear, or other ranks do not come.
        RunDirectoryError: see :class:`~outlast.session.place.RunPlace`.
        ConfigError, CommError, CheckpointError: see :func:`outlast.comm.attach` and :class:`Checkpointer`.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None,
        model: Model,
        optimizer: Optimizers | None = None,
        *,
        comm: Comm = None,
        checkpoint: CheckpointConfig | Mapping[str, Any] | Literal[False] | None = None,
        numerics: Numerics = None,
        resume: Literal["auto", "never"] | int = "auto",
        notice_grace_s: float | None = 25.0,
        timeout_s: float = 600.0,
    ) -> None:
        models, optimizers = named(model, optimizer)
        config, watched = checkpoint_settings(checkpoint), numerics_settings(numerics)
        if resume not in ("auto", "never") and (isinstance(resume, (bool, str)) or resume < 0):
            raise SessionError(f"Session: resume = {resume!r}", 'give "auto", "never" or a step')
        self._resume_from: Literal["auto", "never"] | int = resume
        self._stack = contextlib.ExitStack()
        try:
            self._open(run, models, optimizers, comm, config, watched, notice_grace_s, timeout_s)
        except BaseException:
            self._stack.close()
            raise

    def _open(
        self,
        run: str | os.PathLike[str] | None,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        comm: Comm,
        config: CheckpointConfig | None,
        watched: NumericsConfig | None,
        notice_grace_s: float | None,
        timeout_s: float,
    ) -> None:
        enter = self._stack.enter_context
        notice = None if notice_grace_s is None else enter(Notice(notice_grace_s))
        self.device = next((p.device for m in models.values() for p in m.parameters()), torch.device("cpu"))
        """Where the first model's parameters are."""
        self._place = find_place()
        if dist.is_initialized():  # whoever did so knows; it need not have been a launcher
            self._place = replace(self._place, rank=dist.get_rank(), world_size=dist.get_world_size())
        if not dist.is_initialized() and self._place.world_size > 1:
            process_group.start(self._place, self.device, timedelta(seconds=timeout_s))
            self._stack.callback(_leave_group)
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._agreement = StepAgreement(self.rank, self.world_size, notice)
        # torchrun counts restarts per node; a node whose own ranks never failed would not resume.
        if self._agreement.maximum(self._place.generation) > 0:
            self._resume_from = "auto"
        self._run = RunPlace(run, self._place, self._agreement, resuming=self._resume_from != "never")
        self._stack.callback(self._run.close)
        self.run_dir = self._run.path
        """The run's directory, absolute."""
        self._run.watch.begin_phase("setup")
        models = {name: wrapped(each, self.world_size) for name, each in models.items()}
        self.model: Any = models.get("", models)
        """What the loop calls: the model, or the models by name. Bare ones are in DDP by now, if there are several
        ranks."""
        parts = [trained(name, each, optimizers.get(name)) for name, each in models.items()]
        reducers = attach_reducers(parts, comm, self.world_size)
        for reducer in reducers.values():
            self._stack.callback(reducer.close)
        self._state = SessionState(parts, reducers)
        self._checkpoints: SessionCheckpoints | None = None
        if config is not None:
            for engine in self._state.engines:
                engine.attach()
                self._stack.callback(engine.close)
            self._checkpoints = SessionCheckpoints(
                config, self._run, self._place, self._agreement, self._state, self.device
            )
            enter(self._checkpoints.checkpointer)
        for one in parts:
            self._stack.callback(one.count_updates())
        self._numerics = SessionNumerics(parts, watched, self._run.events, self.rank)
        self._stack.callback(self._numerics.close)
        self._first_step: int | None = None
        self._last_step = 0
        self._done_step = 0
        self._steps_taken = False
        self._updates_before = 0  # those before the step that the loop is in
        self._record = StepRecord(self._run, self._state)
        self._wanted = False
        self._inside = 0  # the step that the loop is in
        self._closed = False
        self.ending = False
        """Whether a notice came: this step is the last one of this start. The same on all ranks."""

    def add(self, *, replicated: bool | None = None, **parts: Any) -> None:
        """Save these with every checkpoint, and put them back, under their names; before :meth:`steps`.

        Args:
            replicated: whether they are equal on all ranks, so that one of them is saved. None: modules (their
                parameters; buffers are each rank's own), optimizers, schedulers and gradient scalers are; anything else
                is each rank's own, and can only be resumed on as many ranks.
            parts: with ``state_dict()`` and ``load_state_dict()``: ``session.add(scheduler=scheduler, ema=ema)``.

        Raises:
            SessionError: one has neither, its name is taken, or the run has been resumed.
        """
        if self._first_step is not None:
            raise SessionError(
                f"session.add({', '.join(parts)}) after the run was resumed: its state would not be put back",
                "add it before session.steps() and session.resume()",
            )
        for name, holder in parts.items():
            self._state.add(name, holder, replicated)

    def resume(self) -> int:
        """Restore the checkpoint to go on from, if there is one; :meth:`steps` does this by itself. Collective.

        Returns:
            The last step that is done; 0 if the run begins.

        Raises:
            CheckpointError, CommStateMismatch: see :meth:`Checkpointer.restore`; what is saved does not fit.
        """
        if self._first_step is None:
            if self._checkpoints is not None and self._resume_from != "never":
                self._done_step = self._checkpoints.restore(self._resume_from)
            self._first_step = self._done_step + 1
            self._run.watch.take_steps(self._done_step)
        return self._done_step

    def steps(self, last_step: int) -> Iterator[int]:
        """The numbers of the steps that are left to do, up to ``last_step``; each is done when the next is asked for.

        Between two steps it saves what is due, writes the step's event, and learns whether a notice came, after which
        there are no more. Leave it early (``break``) on all ranks in the same step or on none.

        Args:
            last_step: number of the run's last step, over all its starts; the first step is 1.

        Raises:
            EndedEarly: a rank has left its loop before the others.
            SessionError: called twice; or the model has changed since the session began.
            StateMismatch: the run has done more steps already.
            SnapshotMutated: a tensor changed before its snapshot was copied.
        """
        self.begin(last_step)
        return self._steps()

    def _steps(self) -> Iterator[int]:
        while self._done_step < self._last_step and not self.ending:
            yield self.begin_step()
            self.end_step()

    def begin(self, last_step: int) -> int:
        """For a loop that is another's, such as a library's trainer: what :meth:`steps` does at first. Collective.

        After it comes, for each step, :meth:`begin_step` before its first forward, and :meth:`end_step` after all that
        it changes, which says when a notice came; and in the end ``close()``, or ``close(error)``. An example is in
        docs/session.md.

        The rest is as with :meth:`steps`: :meth:`add` before it; :meth:`log`, :meth:`save`, :meth:`evaluating`
        after it. Random-number states are put back as they were at the :meth:`end_step` that saved them. What a loop
        has to know before its models exist is read by :func:`~outlast.session.saved_parts.newest_parts`.

        Args:
            last_step: number of the run's last step, over all its starts; the first step is 1.

        Returns:
            The last step that is done; 0 if the run begins.

        Raises:
            SessionError, StateMismatch: see :meth:`steps`; CheckpointError, CommStateMismatch: see :meth:`resume`.
        """
        if self._steps_taken:
            raise SessionError(
                "session.steps() was called twice, or after session.begin()",
                "use one loop, or a session for each; epochs go inside the loop",
            )
        self._steps_taken = True
        self.resume()
        if self._done_step > last_step:
            raise StateMismatch(
                f"the checkpoint is of step {self._done_step}, but the loop ends at step {last_step}",
                "ask for more steps, or go on from an earlier checkpoint with Session(..., resume=STEP)",
            )
        self._last_step = last_step
        self._record.tell_start(self.device, self._place, self._done_step, last_step)
        self._run.watch.begin_phase("program")
        self._record.begin_steps()
        return self._done_step

    def begin_step(self) -> int:
        """The next step begins: with its first forward, however many follow before its update. Returns its number.

        After a notice (:attr:`ending`) a loop that cannot stop at once may take further steps.

        Raises:
            SessionError: the step before has not ended, or was the last; or the steps have not begun.
        """
        if self._inside or self._done_step >= self._last_step:
            before = f"step {self._inside} has not ended" if self._inside else f"the last step is {self._last_step}"
            raise SessionError(
                f"session.begin_step(), but {before}",
                "call begin(LAST_STEP) once, then begin_step() and end_step() in turns, up to that step",
            )
        self._agreement.ask()
        self._updates_before = self._updates
        self._wanted = False
        self._record.begin_step(self._done_step + 1)
        self._numerics.begin_step(self._done_step + 1)
        self._inside = self._done_step + 1
        return self._inside

    def end_step(self) -> bool:
        """The step has ended: what it changes is changed. Saves if that is due, writes the step's event. Collective.

        Returns:
            Whether a notice came, so that the loop is to end now; as :attr:`ending`, the same on all ranks.

        Raises:
            EndedEarly, SessionError, SnapshotMutated: see :meth:`steps`; SessionError also if no step has begun.
        """
        if not self._inside:
            raise SessionError("session.end_step() without a session.begin_step()", "call them in turns")
        step, self._inside = self._inside, 0
        self._end_step(step)
        self.ending = self._agreement.answer()
        return self.ending

    def notice_came(self) -> bool:
        """Whether a notice had come when this step began; as :attr:`ending`, but before its end. Collective."""
        return self._agreement.answer()

    @property
    def done_step(self) -> int:
        """The last step that has ended, over all starts of the run; 0 before the first."""
        return self._done_step

    def log(self, **values: float | Tensor) -> None:
        """Numbers of this step, such as ``loss``, for the run's events; tensors of one element are read at its end."""
        self._record.log(values)

    def save(self) -> None:
        """Save after this step, whether or not a checkpoint is due; call it on every rank."""
        self._wanted = True

    def wait_copied(self) -> None:
        """Wait until the last save needs no tensor any more. An optimizer's update does it by itself; call it before
        anything else changes what is saved.

        Raises:
            SnapshotMutated: a tensor was changed too early; the save is given up.
        """
        if self._checkpoints is not None:
            self._checkpoints.checkpointer.wait_copied()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation inside a step: ``outlast launch`` gives it the time that a pause takes, not that of a step.

        What is saved may be changed in it and put back, as averaged weights are: see :meth:`wait_copied`.
        """
        self.wait_copied()
        watch = self._run.watch
        watch.begin_phase("eval")
        try:
            yield
        finally:
            watch.begin_phase("program")

    def close(self, error: BaseException | None = None) -> None:
        """What the end of the block does, if this error ends it or, with None, without one; see the class. Without an
        error it is collective."""
        self.__exit__(type(error) if error is not None else None, error, error.__traceback__ if error else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._closed:
            return
        if error is not None and not (isinstance(error, SystemExit) and not error.code):
            self._numerics.explain(error)
            self._end(error)
            return
        try:
            self._finish()
        except BaseException as problem:
            self._end(problem)
            raise
        early = self._first_step is not None and self.ending and self._done_step < self._last_step
        self._end(None, "notice" if early else "")
        if early:
            saved = "is durable" if self._checkpoints is not None else "was the last one done"
            if self.rank == 0:
                print(f"outlast: ended by a notice; step {self._done_step} {saved}", file=sys.stderr, flush=True)
            raise SystemExit(RESUME_STATUS)

    def _end(self, error: BaseException | None, reason: str = "") -> None:
        self._closed = True
        self._run.tell_end(
            self._done_step, ok=error is None, reason=reason if error is None else f"{type(error).__name__}: {error}"
        )
        self._stack.__exit__(*((None, None, None) if error is None else (type(error), error, error.__traceback__)))

    def _finish(self) -> None:
        """The ranks leave together, and the last step is made durable."""
        if self._first_step is None:  # no step was asked for
            return
        if self._inside and self._updates > self._updates_before:  # the loop was left in this step, after its update
            self._end_step(self._inside)
        self._run.watch.begin_phase("finish")
        self.ending = self._agreement.leave(self._done_step)
        if self._checkpoints is not None:
            self._checkpoints.finish(self._done_step)

    @property
    def _updates(self) -> int:
        return sum(one.updates for one in self._state.trained)

    def _end_step(self, step: int) -> None:
        for one in self._state.trained:
            one.check_step(step)
        self._done_step = step
        began = self._record.end_update(step)
        self._numerics.end_step(self._record.logged)
        if self._checkpoints is not None:
            self._checkpoints.save_if_due(
                step, self._checkpoints.collect, last=step == self._last_step, wanted=self._wanted
            )
        done = self._record.end_step(step, began)
        if self._checkpoints is not None:
            self._checkpoints.note_step(done)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
