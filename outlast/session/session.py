"""One object that joins the packages for a loop of one's own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.checkpoint import CheckpointConfig
from outlast.diagnostics.numerics import NumericsConfig
from outlast.errors import SessionError, StateMismatch
from outlast.events import StepDone
from outlast.launch.failures import RESUME_STATUS
from outlast.session.checkpoints import SessionCheckpoints
from outlast.session.compression import Comm
from outlast.session.joining import join
from outlast.session.models import device_of
from outlast.session.numerics import SessionNumerics
from outlast.session.place import RunPlace
from outlast.session.settings import Numerics, checkpoint_settings, named, numerics_settings
from outlast.session.state import SessionState
from outlast.session.step_record import StepRecord
from outlast.session.trainable import Trainable

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
            script's name. A :class:`RunPlace` was taken before there was a model, and stays open when the session ends.
        model: in DDP, sharded with ``fully_shard``, what ``deepspeed.initialize`` returned, or bare; on its device.
            Several go by name, as do their optimizers. A :class:`Trainable` has wrapped its models itself, and lays out
            its checkpoints.
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
        run: RunPlace | str | os.PathLike[str] | None,
        model: Model | Trainable,
        optimizer: Optimizers | None = None,
        *,
        comm: Comm = None,
        checkpoint: CheckpointConfig | Mapping[str, Any] | Literal[False] | None = None,
        numerics: Numerics = None,
        resume: Literal["auto", "never"] | int = "auto",
        notice_grace_s: float | None = 25.0,
        timeout_s: float = 600.0,
    ) -> None:
        models, optimizers = ({}, {}) if isinstance(model, Trainable) else named(model, optimizer)
        config, watched = checkpoint_settings(checkpoint), numerics_settings(numerics)
        if resume not in ("auto", "never") and (isinstance(resume, (bool, str)) or resume < 0):
            raise SessionError(f"Session: resume = {resume!r}", 'give "auto", "never" or a step')
        self._resume_from: Literal["auto", "never"] | int = resume
        self._state: Trainable
        with contextlib.ExitStack() as stack:
            self._stack = stack
            if not isinstance(run, RunPlace):
                run = join(
                    run,
                    stack,
                    device=device_of(models.values()),
                    resuming=resume != "never",
                    notice_grace_s=notice_grace_s,
                    timeout_s=timeout_s,
                )
            self._run = run
            if run.place.generation > 0:  # these ranks were restarted
                self._resume_from = "auto"
            if isinstance(model, Trainable):
                self._state = model
            else:
                self._state = SessionState(models, optimizers, comm, self._run.place.world_size)
            stack.callback(self._state.close)
            self._open(config, watched)
            self._stack = stack.pop_all()

    def _open(self, config: CheckpointConfig | None, watched: NumericsConfig | None) -> None:
        run, state = self._run, self._state
        self._agreement = run.agreement
        self.rank, self.world_size = run.place.rank, run.place.world_size
        self.run_dir = run.path
        """The run's directory, absolute."""
        self.device = state.device
        """Where the first model's parameters are."""
        self.model: Any = state.model
        """What the loop calls: the model, or the models by name. Bare ones are in DDP by now, if there are several
        ranks."""
        run.watch.begin_phase("setup")
        self._checkpoints: SessionCheckpoints | None = None
        if config is not None:
            self._checkpoints = SessionCheckpoints(config, run, state)
            self._stack.enter_context(self._checkpoints.checkpointer)
        self._numerics = SessionNumerics(state, watched, run)
        self._stack.callback(self._numerics.close)
        self._first_step: int | None = None
        self._last_step = 0
        self._done_step = 0
        self._steps_taken = False
        self._updates_before = 0  # those before the step that the loop is in
        self._record = StepRecord(run, state)
        self._done: StepDone | None = None
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

    def steps(self, last_step: int, after_step: Callable[[StepDone], None] | None = None) -> Iterator[int]:
        """The numbers of the steps that are left to do, up to ``last_step``; each is done when the next is asked for.

        Between two steps it saves what is due, writes the step's event, and learns whether a notice came, after which
        there are no more. Leave it early (``break``) on all ranks in the same step or on none.

        Args:
            last_step: number of the run's last step, over all its starts; the first step is 1.
            after_step: called when a step is done and its saving has begun, with its event; what it does, such as an
                evaluation, is in no step's time.

        Raises:
            EndedEarly: a rank has left its loop before the others.
            SessionError: called twice; or the model has changed since the session began.
            StateMismatch: the run has done more steps already.
            SnapshotMutated: a tensor changed before its snapshot was copied.
        """
        self.begin(last_step)
        return self._steps(after_step)

    def _steps(self, after_step: Callable[[StepDone], None] | None) -> Iterator[int]:
        while self._done_step < self._last_step and not self.ending:
            yield self.begin_step()
            self.end_step()
            if after_step is not None and self._done is not None:
                after_step(self._done)
                self._record.begin_steps()

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
        self._record.tell_start(self._done_step, last_step)
        self.ending = self._agreement.came()
        self._run.watch.go_on()
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
        self._inside = step = self._done_step + 1
        if not self._run.loop_tells:  # else it asks itself, when it knows more
            self._agreement.ask()
        self._updates_before = self._state.updates
        self._wanted = False
        self._record.begin_step()
        self._state.begin_step(step)
        self._numerics.begin_step(step)
        self._run.watch.begin_step(step)
        return step

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
        return self.ending

    def ask_notice(self) -> None:
        """Look again, now, whether a notice came to any rank: in a step, which so far knows of those before it began;
        or in a long evaluation, which it shows to be alive. The answer is at the step's end, or :meth:`notice_came`.
        Collective."""
        self._run.watch.beat()
        self._agreement.ask()

    def notice_came(self) -> bool:
        """Whether a notice had come when that was asked: as the step began, or by :meth:`ask_notice`. It is what
        :attr:`ending` becomes, but before the step's end. Collective."""
        came = self._agreement.answer()
        if not self._inside:
            self.ending = came
        return came

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
            with self._record.spent("checkpoint"):
                self._checkpoints.checkpointer.wait_copied()

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """The wait for a step's data, where they come from elsewhere than a torch DataLoader, whose waits are known."""
        return self._record.spent("data")

    @contextlib.contextmanager
    def evaluating(self, *, changes: bool = True) -> Iterator[None]:
        """Evaluation: ``outlast launch`` gives it the time that a pause takes, not that of a step.

        Args:
            changes: what is saved may be changed in it and put back, as averaged weights are: see :meth:`wait_copied`.
        """
        if changes:
            self.wait_copied()
        watch = self._run.watch
        watch.begin_phase("eval")
        try:
            yield
        finally:
            watch.go_on()

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
        if self.end():
            raise SystemExit(RESUME_STATUS)

    @property
    def ended_by(self) -> str:
        """Why this start of the run ends before the last step; empty if it does not."""
        if not self.ending or self._done_step >= self._last_step:
            return ""
        return f"notice ({self._agreement.notice or 'on another node'})"

    def end(self) -> bool:
        """What the end of the block does without an exception, but for ending the process. Collective.

        Returns:
            Whether a notice has ended the loop before its last step.

        Raises:
            NotDurable, EndedEarly, SnapshotMutated: see the class.
        """
        try:
            self._finish()
        except BaseException as problem:
            self._end(problem)
            raise
        self._end(None)
        if self.ended_by and not self._run.loop_tells:
            saved = "is durable" if self._checkpoints is not None else "was the last one done"
            self._run.say(f"ended by a notice; step {self._done_step} {saved}")
        return bool(self.ended_by)

    def _end(self, error: BaseException | None) -> None:
        self._closed = True
        reason = self.ended_by if error is None else f"{type(error).__name__}: {error}"
        self._run.tell_end(self._done_step, ok=error is None, reason=reason)
        self._stack.__exit__(*((None, None, None) if error is None else (type(error), error, error.__traceback__)))

    def _finish(self) -> None:
        """The ranks leave together, and the last step is made durable."""
        if self._first_step is None:  # no step was asked for
            return
        if self._inside and self._state.updates > self._updates_before:  # left in this step, after its update
            self._end_step(self._inside)
        self._run.watch.begin_phase("finish")
        self.ending = self._agreement.leave(self._done_step)
        if self._checkpoints is not None:
            why = f"the run was ended by a {self.ended_by}" if self.ended_by else "training is done"
            self._checkpoints.finish(self._done_step, why)

    def _end_step(self, step: int) -> None:
        self._record.end_update(step)
        self._done_step = step
        self._numerics.end_step(self._record.logged)
        self.ending = self._agreement.answer()  # before saving, so that it is known whether this is the last step
        if self._checkpoints is not None:
            with self._record.spent("checkpoint"):
                last = self.ending or step == self._last_step
                self._checkpoints.save_if_due(step, self._state.collect, last=last, wanted=self._wanted)
        self._done = self._record.end_step(step)
        if self._checkpoints is not None:
            self._checkpoints.note_step(self._done)
