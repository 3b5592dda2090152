"""The class that DeepSpeed calls, and the engine's methods that it replaces.

See :mod:`outlast.checkpoint.deepspeed`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from outlast.checkpoint.attach import attach
from outlast.checkpoint.checkpointer import Checkpointer
from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.deepspeed.files import CHANGING, Files, FilesElsewhere, step_of
from outlast.checkpoint.deepspeed.passing import SEAMS, Passing
from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore.messages import Failure, all_gather_messages
from outlast.checkpoint.tools.open_step import OpenedStep
from outlast.errors import CheckpointError, CheckpointNotFound, NotDurable
from outlast.events import Event

_log = logging.getLogger("outlast.checkpoint")


class DeepSpeedCheckpointEngine:
    """DeepSpeed's ``CheckpointEngine`` for one engine; made by :func:`outlast.checkpoint.deepspeed.attach`.

    A checkpoint is a step of :class:`Checkpointer`, numbered by ``engine.global_steps``: what a rank would have written
    into DeepSpeed's files is its local state, by file name. It is committed in two phases while training goes on; one
    without a commit record does not count, whatever its tag.

    Failure contract: as :class:`Checkpointer`. A failure of the environment makes a save fail: an event reports it and
    training goes on. For state that cannot be stored, ``engine.save_checkpoint`` raises on all ranks. For a tensor that
    was changed too early, ``engine.step`` or the next call raises. A save is committed only after the next update or
    save has begun, or :meth:`close` was called.
    """

    name = "outlast"

    def __init__(self, engine: Any, config: CheckpointConfig, on_event: Callable[[Event], None] | None) -> None:
        self._engine = engine
        self._config = config
        self._on_event = on_event
        self._former = engine.checkpoint_engine
        self._passing = Passing(engine)
        self._agreement = Agreement(None, dist.get_rank(), dist.get_world_size())
        self.before_update: Callable[[], object] | None = None
        """Called right before ``engine.step`` updates anything, for a Checkpointer that somebody else has."""
        self.saved_elsewhere = False
        """Whether somebody else has the Checkpointer: the engine's own saving and loading are refused then."""
        self._folder = ""
        self._checkpointer: Checkpointer | None = None
        self._saved_to: set[str] = set()
        """Folders with steps of this run, which it need not go on from to save there again."""
        self._tags: dict[int, str] = {}
        self._closed = False
        engine.checkpoint_engine = self
        engine.save_checkpoint = self._save_checkpoint
        engine.load_checkpoint = self._load_checkpoint
        engine._get_all_ckpt_names = self._passing.names_for
        engine._copy_recovery_script = self._passing.copy_recovery_script

    # What DeepSpeed calls. Calls outside of save_checkpoint and load_checkpoint are exports, like save_16bit_model.

    def create(self, info: Any) -> None:
        """Begin a checkpoint, or an export."""
        if not self._passing.collecting:
            self._former.create(info)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder for an export; a checkpoint does not need it."""
        if not self._passing.collecting:
            self._former.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Collect a file's state; it is stored when DeepSpeed has passed all files of the checkpoint.

        Raises:
            CheckpointError: this file's state was passed before.
        """
        if self._passing.collecting:
            self._passing.take(state_dict, os.path.basename(path))
        else:
            self._former.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        """The state that DeepSpeed saved as ``DIR/TAG/FILE``, verified; changes nothing, and is not collective.

        A save that is still running is ignored.

        Args:
            path: with the tag that was saved; of several steps with this tag the newest is read. A path that is a file
                (an export) is read by DeepSpeed's own engine.
            map_location: a device; None and functions mean the CPU.

        Raises:
            CheckpointNotFound: there is no committed step with this tag, or it does not have the file.
            CorruptCheckpoint, IncompleteCheckpoint, CheckpointError: see :class:`OpenedStep`.
        """
        if self._passing.loading is not None:
            return self._passing.loading.read(os.path.basename(path), _device(map_location))
        if os.path.isfile(path):
            return self._former.load(path, map_location)
        folder, file = os.path.split(os.path.abspath(path))
        url, tag = os.path.split(folder)
        with OpenedStep(url, step_of(url, tag)) as opened:
            files = Files(url, opened.step, opened.load(None), opened.load, self._passing.kinds)
            return files.read(file, _device(map_location))

    def commit(self, info: Any) -> bool:
        """Complete an export. Checkpoints commit themselves."""
        return bool(self._former.commit(info))

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether the rank saves the state that its data-parallel group has in common."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """True: ``save_checkpoint`` returns before the checkpoint is durable, and DeepSpeed writes no ``latest``."""
        return True

    def set_commit_info(self, info: Any) -> None:
        """Do nothing: there is nothing to remember."""

    def get_commit_info(self) -> None:
        """Wait until the running save does not need any tensor; DeepSpeed calls this right before an update.

        Returns None, so that DeepSpeed neither waits for the commit nor writes ``latest``.

        Raises:
            SnapshotMutated: a tensor was changed too early; the save is abandoned.
        """
        if self.before_update is not None:
            self.before_update()
        if self._checkpointer is not None:
            self._checkpointer.wait_copied()

    def preserves_storage_sharing(self) -> bool:
        """False: a tensor that is part of a larger storage is saved as its own bytes alone."""
        return False

    def cleanup(self) -> None:
        """As :meth:`close`; ``engine.destroy`` calls it."""
        self.close()

    # End of what DeepSpeed calls.

    def close(self) -> None:
        """Wait until the running save is committed or has failed, and restore the engine's methods; twice is harmless.

        Raises:
            NotDurable: the last save has failed.
            SnapshotMutated: a tensor of the running save was changed too early.
        """
        self._end(lambda checkpointer: checkpointer.close())

    def abort(self) -> None:
        """Abandon the running save, report it as failed, and restore the engine's methods."""
        self._end(lambda checkpointer: checkpointer.abort())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """As that of :class:`Checkpointer`."""
        self._end(lambda checkpointer: checkpointer.__exit__(kind, error, tb))

    def _end(self, how: Callable[[Checkpointer], None]) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self._checkpointer is not None:
                how(self._checkpointer)
        finally:
            self._engine.checkpoint_engine = self._former
            for name in SEAMS:
                delattr(self._engine, name)

    def _save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: object = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Begin to save; collective. Arguments and result are DeepSpeed's.

        Raises:
            CheckpointError: names the rank, DeepSpeed's file and the key.
            SnapshotMutated: a tensor of the save before was changed too early.
        """
        self._refuse_elsewhere("save_checkpoint()", "session.save() saves after this step")
        step = int(self._engine.global_steps)
        name = f"global_step{step}" if tag is None else str(tag)
        if not save_latest:
            raise CheckpointError(
                "save_latest = False: outlast has no pointer to the latest checkpoint that could be left unchanged",
                "leave it out, and save checkpoints that must not be resumed from to another folder",
            )
        checkpointer = self._at(save_dir)
        checkpointer.wait_copied()
        if self._tags.get(step, name) != name:
            raise CheckpointError(
                f"step {step} was already saved as {self._tags[step]!r}, and cannot be saved as {name!r} too",
                "save to another folder, or after the next step",
            )
        replicated, local = self._passing.collect(name, client_state, exclude_frozen_parameters)
        checkpointer.save(step, replicated=replicated, local=local, eager=(CHANGING,))
        self._saved_to.add(self._folder)
        self._tags[step] = name
        return True

    def collect(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The engine's state for a Checkpointer that somebody else has; collective.

        Returns:
            What to pass as ``replicated`` and ``local``, with ``CHANGING`` among ``eager``; the tensors are live.

        Raises:
            CheckpointError: names the rank, DeepSpeed's file and the key; or outlast is detached from the engine.
        """
        self._check_attached()
        return self._passing.collect(f"global_step{int(self._engine.global_steps)}", None, False)

    def put_back(
        self, folder: str, step: int, replicated: Mapping[str, Any], local: Callable[[int], Mapping[str, Any]]
    ) -> None:
        """Load what :meth:`collect` returned on each rank; collective.

        Args:
            folder: an existing one, for DeepSpeed to find files of these names in.
            step: for messages.
            replicated: the state that ranks have in common.
            local: returns the local state of a rank.

        Raises:
            CheckpointError: DeepSpeed did not save this, or outlast is detached from the engine.
        """
        self._check_attached()
        self._passing.put_back(folder, FilesElsewhere(folder, step, replicated, local, self._passing.kinds))

    def _load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: object = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Resume; collective. Arguments and result are DeepSpeed's; (None, None) if there is no checkpoint at all.

        Without a tag, from the newest step that all ranks find complete and undamaged; damaged newer ones are
        renamed to ``step_XXXXXXXX.aside-N``. With a tag, from the newest committed step with this tag; newer ones are
        renamed.

        Raises:
            CheckpointError: see :meth:`Checkpointer.restore`.
        """
        self._refuse_elsewhere(
            "load_checkpoint()", "session.steps() and session.resume() load; earlier weights are loaded before"
        )
        if load_module_only or (not load_optimizer_states and self._engine.zero_optimization_partition_weights()):
            raise CheckpointError(
                "load_checkpoint resumes from a whole checkpoint, and sets newer ones aside",
                "to load only weights, read a file: engine.checkpoint_engine.load(f'{dir}/{tag}/{file}')",
            )
        self._leave()  # the running save may be the step to load
        checkpointer = self._at(load_dir)
        restored = checkpointer.restore("auto" if tag is None else self._agreed_step(str(tag)))
        if restored is None:
            if os.path.isfile(os.path.join(self._folder, "latest")):
                raise CheckpointError(
                    f"{self._folder} has checkpoints in DeepSpeed's own format, and none in outlast's",
                    "load them before attach(), and save to another folder",
                )
            _log.warning("%s: there is no checkpoint yet", self._folder)
            return None, None
        own, rank = restored.local, dist.get_rank()
        files = Files(
            self._folder,
            restored.step,
            restored.replicated,
            lambda other: own if other == rank else restored.read_local(other),
            self._passing.kinds,
        )
        path, client_state = self._passing.put_back(
            self._folder,
            files,
            load_module_strict,
            load_optimizer_states,
            load_lr_scheduler_states,
            load_module_only,
            custom_load_fn,
        )
        self._tags = {step: name for step, name in self._tags.items() if step <= restored.step}
        return path, client_state

    def _agreed_step(self, tag: str) -> int:
        """The newest step with a tag, as rank 0 sees it; collective, raises on all ranks."""
        step = -1
        failures: list[Failure] = []
        if dist.get_rank() == 0:
            try:
                step = step_of(self._folder, tag)
            except CheckpointError as error:
                failures = [Failure.of(error)]
        for _, failure in all_gather_messages(self._agreement, Failure, failures):
            raise CheckpointNotFound(failure.reason, failure.fix)
        return self._agreement.broadcast_int(step)

    def _at(self, folder: str | os.PathLike[str]) -> Checkpointer:
        """The Checkpointer of a folder; that of another folder is closed first."""
        self._check_attached()
        name = os.fspath(folder)
        if "://" in name:
            raise CheckpointError(f"{name}: DeepSpeed does not take URLs", "pass a path that all ranks share")
        name = os.path.abspath(name)
        if self._checkpointer is None or name != self._folder:
            self._leave()
            config = replace(self._config, old_steps="keep") if name in self._saved_to else self._config
            self._checkpointer = attach(name, config, on_event=self._on_event)
            if name != self._folder:
                self._folder, self._tags = name, {}
        return self._checkpointer

    def _refuse_elsewhere(self, call: str, instead: str) -> None:
        if self.saved_elsewhere:
            raise CheckpointError(
                f"engine.{call}, but this engine's state is part of other checkpoints, of a session or of the trainer",
                f"leave it out: {instead}",
            )

    def _check_attached(self) -> None:
        if self._closed:
            raise CheckpointError(
                "outlast is detached from this engine, which has been closed or destroyed",
                "attach again, or call engine.destroy() when nothing is to be saved any more",
            )

    def _leave(self) -> None:
        """Wait until the running save is committed or has failed."""
        if self._checkpointer is not None:
            checkpointer, self._checkpointer = self._checkpointer, None
            try:
                checkpointer.close()
            except NotDurable as error:  # training goes on, and saves elsewhere
                _log.warning("%s", error.what)


def _device(map_location: Any) -> torch.device:
    return torch.device("cpu" if map_location is None or callable(map_location) else map_location)
