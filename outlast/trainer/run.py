"""What a run of the trainer trains and saves on one rank, and what the training loop does with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from outlast.checkpoint import Checkpointer, Restored, load
from outlast.checkpoint.rng import load_rng_state, rng_state
from outlast.comm import ReduceStats
from outlast.diagnostics.numerics import NumericsConfig, NumericsWatch
from outlast.errors import CommError, NonFiniteGradient, StateMismatch, TrainingDiverged
from outlast.events import EvalDone
from outlast.session import Session
from outlast.session.place import RunPlace
from outlast.session.scheduled_checkpoints import Collected
from outlast.session.trainable import Tell, Trainable
from outlast.trainer.batches import Batch, in_form
from outlast.trainer.config import Config
from outlast.trainer.engines.base import Engine, UpdateStats
from outlast.trainer.progress import Progress
from outlast.trainer.saved_settings import changed_settings, saved_settings
from outlast.trainer.sources import Source

_LOG = logging.getLogger("outlast")


class Run(Trainable):
    """An engine with its data, as a session trains it. Methods are local unless their docstring says collective.

    Args:
        config: all settings.
        start: this start of the run, whose loop tells.
        engine: owns the model, and updates it.
        loader: of training.
        held_out: what is evaluated on; None: nothing is.
        device: where the model is.
        progress: logs.
    """

    def __init__(
        self,
        config: Config,
        start: RunPlace,
        engine: Engine,
        loader: Source,
        held_out: Source | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        assert start.recorder is not None
        self.config, self.start, self.engine = config, start, engine
        self.loader, self.held_out, self.progress = loader, held_out, progress
        self.place, self.recorder = start.place, start.recorder
        self.model, self.device, self.comm = engine.model, device, config.comm.describe()
        self._first_step = 1
        self._watch: NumericsWatch | None = None
        self._stats = UpdateStats(lr=0.0)

    @property
    def lr(self) -> float:
        """See :class:`Trainable`."""
        return self._stats.lr

    def parameters(self) -> int:
        """See :class:`Trainable`; ZeRO 3 has taken the entries away, and tells their number."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return sum(int(getattr(one, "ds_numel", one.numel())) for one in trained)

    def attach(self, checkpointer: Checkpointer) -> None:
        """See :class:`Trainable`: the loop waits itself, and a change before that is an error."""
        if self.config.trainer.engine != "deepspeed":  # which takes the parameters themselves away
            checkpointer.watch(self.model)

    def watch_numbers(self, config: NumericsConfig, tell: Tell) -> tuple[dict[str, NumericsWatch], list[str]]:
        """See :class:`Trainable`; what is not watched, the watch logs itself."""
        if self.config.trainer.engine == "deepspeed":  # which has gradients and copies of parameters of its own
            config = replace(config, not_finite="off", rerun_batches=0, replicas_every_steps=0, drift_every_steps=0)
        self._watch = NumericsWatch(
            self.model,
            self.engine.optimizer,
            config,
            on_event=partial(tell, ""),
            ranks=tuple(range(self.place.world_size)),
            recorder=self.recorder,
            follows_updates=False,
        )
        return {"": self._watch}, []

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of ``step``. Collective in the first step."""
        batches = [in_form(pair, self.config.data.form) for pair in self.loader.batches(step)]
        if step == self._first_step and self.place.world_size > 1 and (stream := self.loader.local_state()):
            token = self.recorder.enter("all_reduce", 8, "first batches")
            same = self.start.agreement.all_equal(int(stream["digest"]))
            self.recorder.complete(token)
            if same and self.place.rank == 0:
                _LOG.warning("all ranks take the same batches: have data.factory share them out by rank and world_size")
        return batches

    def forward_backward(self, step: int, batches: list[Batch]) -> float:
        """See :class:`Engine`; an error about what is not finite says where it comes from."""
        with self._explained(step):
            return self.engine.forward_backward(step, batches)

    def update(self, step: int) -> dict[str, float]:
        """See :class:`Engine`; an error about what is not finite says where it comes from. Returns the norm."""
        with self._explained(step):
            self._stats = self.engine.update(step)
        norms = {"grad_norm": self._stats.grad_norm, "update_norm": self._stats.update_norm}
        return {name: norm for name, norm in norms.items() if norm is not None}

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except (NonFiniteGradient, TrainingDiverged) as error:  # which all ranks raise alike
            if self._watch is None:
                raise
            explained = self._watch.explained(error, step)
            self._watch.after_update()  # it is told
            raise explained from error

    def end_step(self, step: int) -> ReduceStats:
        """See :class:`Trainable`."""
        if self._watch is not None:
            self._watch.after_update()
        return self._stats.reduced

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after ``step``."""
        every = self.config.trainer.eval_every_steps
        return step == self.config.trainer.steps or (every > 0 and step % every == 0)

    def evaluate(self, session: Session, step: int) -> None:
        """Measure the held-out loss, the mean over all ranks. A notice cuts it off.

        Collective: raises CommError within the process group's timeout when a peer is lost.
        """
        if self.held_out is None:
            return
        start_s = time.perf_counter()
        with session.evaluating(changes=False):
            mean = self.engine.evaluate(self._held_out_batches(session, self.held_out.fresh()))
            if session.ending:
                if self.place.rank == 0:
                    _LOG.info("step %d: the evaluation is cut off by a notice", step)
                return
            token = self.recorder.enter("all_reduce", mean.nbytes, "held-out loss")
            try:
                dist.all_reduce(mean)
                total = float(mean)  # with NCCL the collective is over only now
            except RuntimeError as error:
                what = "all_reduce of the held-out loss"
                raise CommError.of_lost_peer(what, self.place.rank, self.place.world_size, error) from error
            self.recorder.complete(token)
        loss = total / self.place.world_size
        self.start.events.write(EvalDone(step=step, loss=loss, seconds=time.perf_counter() - start_s))
        if self.place.rank == 0:
            _LOG.info("step %d: held-out loss %.4f", step, loss)

    def _held_out_batches(self, session: Session, held_out: Source) -> Iterator[Batch]:
        """Each batch is a sign of life, so that a long evaluation is no hang. After a notice there are no more."""
        for number in range(self.config.trainer.eval_batches):
            for pair in held_out.batches(number + 1):
                session.ask_notice()
                yield in_form(pair, self.config.data.form)
                if session.notice_came():
                    return

    def collect(self, step: int) -> Collected:
        """See :class:`Trainable`. Collective."""
        state = self.engine.state()
        replicated = {**state.replicated, "data": self.loader.state(), "settings": saved_settings(self.config)}
        local: dict[str, Any] = {**state.local, "rng": rng_state()}
        if stream := self.loader.local_state():
            local["stream"] = stream
        return Collected(replicated, local, state.eager | {"rng", "stream"})

    def like(self) -> dict[str, Any] | None:
        """See :class:`Engine`."""
        return self.engine.like()

    def load(self, restored: Restored, *, rank: int, world_size: int) -> list[str]:
        """See :class:`Trainable`.

        If the world size changed, the data continue with the first window that no step has seen, error-feedback state
        is redistributed, and additional ranks start with freshly seeded generators.

        Raises:
            StateMismatch, DataError: it is of a later step than the last, or of other settings or data.
        """
        step, last_step, ranks = restored.step, self.config.trainer.steps, restored.world_size
        if step > last_step:
            raise StateMismatch(
                f"the newest checkpoint is of step {step}, but training ends at step {last_step}",
                f"raise trainer.steps, or resume from an earlier step with --resume STEP (at most {last_step})",
            )
        # Checkpoints of earlier versions do not say with which settings they were trained.
        changed = changed_settings(restored.replicated.get("settings", {}), self.config, step)
        self.loader = self.loader.resumed_from(restored.replicated["data"], step, restored.local.get("stream"))
        self.engine.load(restored)
        if rank < ranks:
            load_rng_state(restored.read_local(rank)["rng"])
        self._first_step = step + 1
        for line in changed if rank == 0 else ():
            _LOG.info("changed since step %d: %s", step, line)
        if ranks != world_size and rank == 0:
            _LOG.info(
                "step %d was saved by %d ranks and continues on %d; a step now takes %s windows of the text",
                step,
                ranks,
                world_size,
                self.loader.state().get("windows_per_step"),
            )
        return []

    def begin_from(self) -> Restored:
        """Take the parameters and buffers of ``run.start_from``, and nothing else. Collective.

        Returns:
            The step that they are of; ``not_taken`` names the tensors that do not fit.

        Raises:
            CheckpointError: see :func:`outlast.checkpoint.load`; a :class:`StateMismatch` says which setting helps.
        """
        run, model = self.config.run, self.model
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

    def close(self) -> None:
        """See :class:`Engine`."""
        self.engine.close()
