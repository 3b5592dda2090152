"""The one object a training loop needs: begin a save, wait before the update, restore."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import nn

from outlast.checkpoint.begin import begin
from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.durability import Durability
from outlast.checkpoint.ending import AtExit, Ending, give_up
from outlast.checkpoint.format.step_number import as_step
from outlast.checkpoint.memory.arena import Arena
from outlast.checkpoint.ownership.lease import Lease
from outlast.checkpoint.peers.collectives import Agreement, check_ranks
from outlast.checkpoint.restore.load import Restored
from outlast.checkpoint.save.background import raise_error
from outlast.checkpoint.save.device import DeviceRoom
from outlast.checkpoint.save.hooks import Hooks
from outlast.checkpoint.save.job import SaveJob
from outlast.checkpoint.save.prepare import make_request
from outlast.checkpoint.save.request import SaveContext
from outlast.checkpoint.save.stall_forecast import StallForecast
from outlast.checkpoint.save.storage_save import StorageSave
from outlast.checkpoint.start import Reading, Start, check_place
from outlast.checkpoint.state.selection import Rename, make_selection
from outlast.checkpoint.storage.io_threads import IoThreads
from outlast.checkpoint.storage.open import open_store
from outlast.checkpoint.tiers.manager import Tiers
from outlast.errors import CheckpointError
from outlast.events import Event

_log = logging.getLogger("outlast.checkpoint")


class Checkpointer:
    """Saves state while training goes on, and restores it; one per rank.

    :func:`outlast.checkpoint.attach` makes one for the ranks of a process group::

        with outlast.checkpoint.attach("runs/mine/checkpoints") as checkpointer:
            checkpointer.watch(ddp, optimizer)  # its step waits for what is not copied yet, as wait_copied() does
            restored = checkpointer.restore("auto")  # before the loop: None, or the newest valid step
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpointer.save(step, replicated=state)  # in the loop, on every rank

    ``docs/loop.md`` has whole loops, and says what belongs in a checkpoint.

    Failure contract. What the environment does (a full disk, a silent one, another rank's death) fails a save: it is
    reported by a ``CheckpointFailed`` event and a log line, training goes on, and earlier checkpoints are untouched.
    What the program does wrong is raised: bad state by :meth:`save` at once; a changed snapshot, or a bug in the
    background thread, by the next call of :meth:`wait_copied`, :meth:`save`, :meth:`restore` or :meth:`close`. A save
    is committed only after the training thread has confirmed that nothing was changed, which each of these calls does.
    If the last save to storage fails, :meth:`close` raises :class:`NotDurable`.

    A process that ends without closing it commits what is complete and unchanged, within ``config.exit_wait_s``, and so
    does ``with`` if an exception ends its body. What is not durable is logged; without ``close``, the status is then 1.

    All methods are for one thread, the training thread. Saves issue no collectives.

    Args:
        url: a path or any fsspec URL, shared by all ranks.
        config: its ``url`` and ``every_steps`` are not used.
        rank: of this process; rank 0 coordinates.
        world_size: number of ranks.
        attempt_id: random text, equal on all ranks of this attempt and never used before; votes of other attempts never
            count.
        group: over all ranks, for :meth:`restore`; None takes the default group.
        on_event: takes events, from the training thread and from background threads.
        host: with a memory tier, this node's address at which the other ranks reach this one; None takes that of
            ``config.interface``, or the one on the route to ``MASTER_ADDR``. With a memory tier, construction is
            collective over ``group``.

    Raises:
        MissingDependency: the package for this kind of URL is not installed.
        ConfigError: no such kind of URL.
        CheckpointError: this is one of several ranks, which its launcher's environment says, and there is no process
            group; or, with a memory tier, a rank cannot reach the others.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        config: CheckpointConfig,
        *,
        rank: int,
        world_size: int,
        attempt_id: str,
        group: dist.ProcessGroup | None = None,
        on_event: Callable[[Event], None],
        host: str | None = None,
    ) -> None:
        if not 0 <= rank < world_size or not attempt_id:
            raise CheckpointError(
                f"rank {rank} of {world_size}, attempt_id {attempt_id!r}",
                "0 <= rank < world_size, and an attempt_id that is not empty",
            )
        check_ranks(world_size, group, "outlast.checkpoint.Checkpointer")
        self._store = open_store(url)
        check_place(self._store)
        self._io = IoThreads(config.io_threads, config.commit_timeout_s)
        lease = Lease(
            self._store, config.lease_s, token=attempt_id, ways_out="save to another place; to read, no job has to end"
        )
        self._durability = Durability(on_event)
        self._context = SaveContext(
            self._store, config, rank, world_size, attempt_id, self._durability.on_event, self._io, lease
        )
        self._group = group
        self._arena = Arena(int(config.host_memory_mb * 1e6))
        self._device_room = DeviceRoom()
        self._tiers: Tiers | None = None
        if config.memory_every_steps:
            self._tiers = Tiers(self._context, Agreement(group, rank, world_size), host)
        self._start = Start(self._context, self._tiers)
        self._saving: SaveJob | None = None
        self._awaited: SaveJob | None = None
        """The save whose copy the training thread has waited for."""
        self._hooks = Hooks(self.wait_copied, self._confirm_early)
        self._stall = StallForecast()
        self._save_id = 0
        self._replicated = False  # whether a copy was due at the partner in this attempt
        self._closed = False
        # A thread that is inside PyTorch while the interpreter is taken down would abort the process.
        self._at_exit = AtExit(self._leave, self._durability, config.exit_wait_s)

    @property
    def url(self) -> str:
        """Where checkpoints are saved."""
        return self._store.url

    def claim(self) -> None:
        """Own the place from now on, rather than from the first save; collective over the group.

        Raises:
            PlaceInUse: another job saves there; names its process.
            CheckpointError: the place cannot be written to; or there are several ranks without a process group.
        """
        self._start.claim(Agreement(self._group, self._context.rank, self._context.world_size))

    @property
    def running(self) -> bool:
        """Whether a save to storage is under way on this rank; on rank 0 until all ranks have ended theirs."""
        if self._tiers is not None and self._tiers.storing:
            return True
        return isinstance(self._saving, StorageSave) and not self._saving.done.is_set()

    def save(
        self,
        step: int,
        *,
        replicated: Mapping[str, Any] | None = None,
        local: Mapping[str, Any] | None = None,
        eager: Collection[str] = (),
        durable: bool = True,
    ) -> None:
        """Begin to save the state after ``step``; every rank calls it with the same step.

        The first save, or after a restore the first :meth:`wait_copied`, takes the place for this job alone, and puts
        in order what the restored step leaves behind.

        One save runs at a time: while the one before is being written, this call waits for it, which counts as
        ``blocked_s`` of the new save's ``CheckpointSaved`` event. With a memory tier, this call waits only until the
        save before is in memory, and in the other tiers for which the new one is due.

        Args:
            step: number of the step just done, >= 0; an integer of any kind.
            replicated: state that is equal on all ranks, each of which writes an equal share of it. Nested: keys to
                tensors, JSON values, or dictionaries. DTensors on meshes of all ranks may be among the tensors: each
                rank writes its part, or a share of it where several ranks hold the same part.
            local: this rank's own state, nested in the same way, without DTensors. Either may be left out, but not
                both.
            eager: top-level keys (of either) whose tensors may change at once; they are copied before this returns. All
                other tensors must not be changed until :meth:`wait_copied` has returned. JSON values are always copied.
            durable: save to storage; False: to memory alone (and to the partner's, if that is due).

        Raises:
            CheckpointError: there is nothing to save; a key, value, dtype or DTensor's placement cannot be stored
                (named in the message); or the save is not durable, and there is no memory tier.
            PlaceInUse: (rank 0) another job saves there; or this run restored nothing, and there are committed steps of
                an earlier one (see ``checkpoint.old_steps``).
            SnapshotMutated: a tensor of the save before was changed too early.
            StateMismatch: in the save before, the replicated state of some rank was laid out differently (on rank 0).
        """
        began = time.monotonic()
        # Counted before anything can fail, so that all ranks number their saves alike.
        self._save_id += 1
        step = as_step(step, "save")
        if self._closed:
            raise CheckpointError(f"save of step {step} on a closed Checkpointer")
        if replicated is None and local is None:
            raise CheckpointError(
                f"the save of step {step} was given nothing to save", "pass replicated=, local=, or both"
            )
        if not durable and self._tiers is None:
            raise CheckpointError(
                f"step {step} is to be saved only to memory, but there is no memory tier",
                "set checkpoint.memory_every_steps",
            )
        self._at_exit.user = threading.current_thread()
        self._finish()
        if self._saving is not None and self._saving.refuses(step):
            return
        problem = self._start.before_save()
        make = partial(
            make_request,
            self._context,
            self._group,
            self._device_room,
            step,
            self._save_id,
            replicated=replicated or {},
            local=local or {},
            eager=eager,
            began=began,
            durable=durable,
            # The partner gets the first save at once: what a restart went on from may be in one place alone.
            replicate_now=not self._replicated,
        )
        numbers = step, self._save_id
        saving = begin(make, self._context, self._tiers, self._arena, numbers, durable=durable)
        if saving is None:
            return
        self._replicated, self._saving = True, saving
        saving.predicted_stall_s = self._stall.begin(saving.copied_bytes, time.monotonic())
        if problem is not None:
            saving.give_up(problem)
        saving.start()
        saving.wait(saving.eager_copied)
        saving.blocked_s += time.monotonic() - began

    def wait_copied(self) -> float:
        """Wait until the running save needs no tensor any more; call it right before anything changes them.

        Returns:
            Seconds this call blocked.

        Raises:
            SnapshotMutated: a tensor was changed too early; the save is given up.
            PlaceInUse, CheckpointError: as :meth:`save`, in the first call after a restore; and whenever another job
                was found to have taken the place over.
            Exception: a bug that ended the save before, or an error of ``on_event``.
        """
        self._start.before_update()
        return self._wait_copied()

    def _wait_copied(self) -> float:
        saving = self._saving
        if saving is None:
            return 0.0
        began = time.monotonic()
        if self._tiers is not None:
            self._tiers.raise_errors()
        if self._awaited is not saving:
            self._awaited = saving
            saving.wait(saving.copied)
            if not saving.confirmed:
                saving.blocked_s += time.monotonic() - began
            self._stall.end(asked=began, copied=saving.copied_at)
            saving.confirm()
        raise_error(saving)
        return time.monotonic() - began

    def watch(self, *watched: nn.Module | torch.optim.Optimizer) -> None:
        """Hook optimizers and modules, until this is closed.

        Before each step of an optimizer (of torch's own: after its closure) :meth:`wait_copied` is called, so the loop
        cannot forget it. Whenever backward has accumulated a gradient of a module, a save whose copy has ended by then
        is confirmed; it can then be committed without waiting for the update, if a step takes longer than writing.
        Neither blocks, except in :meth:`wait_copied`.

        Args:
            watched: optimizers whose ``step`` changes what is saved, and modules. If gradients do not pass through the
                parameters' own hooks (FSDP2), a module's hooks never run, and saves are confirmed before the update.
        """
        for each in watched:
            self._hooks.set(each)

    def _confirm_early(self) -> None:
        """Confirm a save whose copy has ended: right now the training thread is changing nothing."""
        saving = self._saving
        if saving is not None and not saving.confirmed and saving.copied.is_set():
            saving.confirm()

    def restore(
        self,
        which: Literal["auto"] | int,
        *,
        like: Mapping[str, Any] | None = None,
        into: Mapping[str, Any] | None = None,
        any_world_size: bool = False,
        parts: Collection[str] | None = None,
        strict: bool | Collection[str] = True,
        rename: Rename | None = None,
        cast: bool | torch.dtype = False,
    ) -> Restored | None:
        """Read a checkpoint back, and verify every byte.

        Collective over the group: all ranks call it with the same arguments.

        ``"auto"`` takes the newest step that all ranks find complete and undamaged. Each file is read from the fastest
        undamaged copy: this node's memory, another node's, the local disks, storage. Newer damaged steps are reported
        (a ``CheckpointRejected`` event, and a log line that names the file). An integer takes that step.

        Reading changes nothing. If the run goes on from there (see :meth:`save`), newer steps are renamed then to
        ``step_XXXXXXXX.aside-N``, which is never read, and interrupted saves are cleared away. With a memory tier, a
        step that is in the memory of too few nodes is copied again at once, unless another job has the place.

        Args:
            which: ``"auto"``, or a step.
            like: the running replicated state, nested as it is saved. Its DTensors come back as DTensors on the same
                mesh with the same placements; each rank reads and verifies only the chunks that its part needs, and
                together the ranks verify all. The step must have exactly the tensors of ``like``, in shape and dtype,
                however they were sharded when it was saved; values other than tensors are not compared. Without
                ``like``, every rank reads all tensors whole.
            into: as ``like``, but what is read goes into these very tensors, on any device, without a second copy of
                the state in memory. ``Restored.replicated`` has them, too. If this raises, some may be overwritten; if
                it returns None, none is. Values other than tensors (steps, learning rates) are only in
                ``Restored.replicated``.
            any_world_size: accept a step that was saved with another world size: then ``Restored.local`` is empty, and
                ``Restored.read_local`` gives the local state of any rank that saved it.
            parts: take only these top-level keys of the state, e.g. ``("model",)``; of others nothing is read, verified
                or compared.
            strict: False takes those tensors of ``like`` or ``into`` that the step has in the same shape and dtype, and
                leaves the others as they are; ``Restored.not_taken`` names them. Top-level keys, e.g. ``("model",)``:
                below these the tensors must be the same.
            rename: what names in the step (keys joined by ``/``) are in the running state. A mapping of names, and of
                beginnings of names that end at a ``/`` or ``.``, of which the longest that fits counts; a function,
                which returns None for what is to be left out; or ``"unwrapped"``, which drops what wrappers of modules
                put into names. With ``like`` and ``into`` names need not agree in that in any case: what torch.compile
                (``_orig_mod.``), DDP (``module.``), FSDP and activation checkpointing put there is not compared.
            cast: True converts floating-point tensors to the dtype that they have in ``like`` or ``into``; without
                these, a dtype to convert all of them to. Numbers that it cannot hold are an error.

        Returns:
            The state, or None if ``"auto"`` finds no checkpoint at all.

        Raises:
            CheckpointNotFound: no such step; names those there are.
            CorruptCheckpoint: the step asked for is damaged, or (``"auto"``) there are checkpoints but none is valid.
            IncompleteCheckpoint: a file or the commit record of the step asked for is missing.
            UnknownFormatVersion: written by another version of outlast; it is left as it is.
            StateMismatch: saved with another world size, without ``any_world_size``; the step has other tensors than
                ``like`` or ``into``, of which none was overwritten then (the message says which argument helps); it
                lacks one of ``parts``; or what is asked for differs between ranks.
            CheckpointError: the storage cannot be read; there are several ranks without a process group; ``like`` or
                ``into`` has a DTensor that could not be saved; or both were given.
        """
        if self._closed:
            raise CheckpointError("restore on a closed Checkpointer")
        if which != "auto":
            which = as_step(which, "restore", "auto")
        self._finish()
        if self._tiers is not None:
            self._tiers.wait()  # a save that is committed after this would be newer than what the run goes on from
        running = like is not None or into is not None
        select = partial(make_selection, parts, strict, rename, cast, running=running)
        reading = Reading(self._context, self._tiers, self._group)
        restored = reading.restore(self._start, which, like, into, select, any_world_size=any_world_size)
        if restored is not None and reading.lacks_copies(restored) and self._start.try_claim(reading.agreement):
            # Before training goes on. If another job has the place, it sees to its copies.
            _log.info("step %d is in the memory of too few nodes; it is copied again", restored.step)
            with self._start.deferred():
                self.save(restored.step, replicated=restored.replicated, local=restored.local, durable=False)
            self._finish()
            if self._tiers is not None:
                self._tiers.wait_partner()
        return restored

    def close(self) -> None:
        """Wait until the running save is committed or has failed, and end the threads; closing twice is harmless.

        Raises:
            NotDurable: the last save to storage failed; says which step is not there, why, and which is.
            SnapshotMutated: a tensor of the running save was changed too early.
            Exception: a bug that ended the save before, or an error of ``on_event``.
        """
        if self._may_end():
            try:
                self._finish()
                if self._tiers is not None:
                    self._tiers.finish(self._save_id + 1)
            finally:
                self._end()
            self._durability.check()

    def abort(self) -> None:
        """Give the running save up, report it as failed, and end the threads.

        What the save has committed by now stays. What the save ran into is not raised.
        """
        if self._may_end():
            give_up(self._saving, self._tiers, CheckpointError("it was aborted before the checkpoint was committed"))
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close it. If an exception ends the body, that is what is raised, and what cannot be committed is logged."""
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        else:
            self._leave(Ending(self._context.config.exit_wait_s, error))

    def _may_end(self) -> bool:
        """Whether it is to be ended here and now, which is done once, and not by a fork of its process."""
        if self._closed or self._at_exit.pid != os.getpid():
            return False
        self._closed = True
        return True

    def _leave(self, ending: Ending) -> None:
        if self._may_end():
            try:
                ending.carry_out(self._saving, self._tiers, self._save_id + 1)
            finally:
                self._end()

    def _end(self) -> None:
        self._hooks.remove()
        if self._saving is not None:
            self._saving.join()
        if self._tiers is not None:
            self._tiers.close()
        self._context.lease.close()
        self._io.shutdown()
        self._arena.clear()
        self._device_room.clear()
        self._at_exit.cancel()

    def _finish(self) -> None:
        """Confirm the running save, and wait for its end."""
        if self._saving is not None:
            self._wait_copied()
            self._saving.wait(self._saving.done)
            raise_error(self._saving)
