"""One save into storage, from the snapshot to the commit record, in a thread of its own.

It has two phases, through the store alone; no collective is issued, and no port is listened on:

1. The coordinator (rank 0), which holds the lease on the place, *opens* the save: it clears away what interrupted saves
   left, and writes the root group's document, which names the attempt and the save. The other ranks write nothing
   before that.
2. Each rank writes its share of the files and fsyncs them, then the directories, and then writes its *vote*: files,
   sizes, checksums.
3. The coordinator waits for all votes of this very save, checks that all ranks have the same replicated state and that
   every file exists with its size, and writes the commit record. A step is a checkpoint if and only if it has one.

A rank gives up on any error, or after ``commit_timeout_s`` without a sign of the others. It then removes what it wrote,
and leaves an empty file as a flag for the other ranks. A save never touches the checkpoints before it.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from concurrent.futures import Future

from outlast.checkpoint import process_exit
from outlast.checkpoint.format.names import COMMIT, STORAGE, failed_name, parse_failed, step_name, vote_path
from outlast.checkpoint.format.records import Fault, FileEntry, crc_hex, seal
from outlast.checkpoint.format.zarr import node_path
from outlast.checkpoint.save.absent import no_vote, not_opened, other_count
from outlast.checkpoint.save.background import failure_text, must_be_raised
from outlast.checkpoint.save.commit import ReceivedVote, build_commit, make_vote, read_vote
from outlast.checkpoint.save.job import SaveJob
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.save.source import Source
from outlast.checkpoint.save.writer import Writer
from outlast.checkpoint.shortage import start
from outlast.checkpoint.steps import catalog, retention
from outlast.checkpoint.storage.io_threads import process_ended
from outlast.errors import CheckpointError
from outlast.events import CheckpointRejected, CheckpointSaved

_log = logging.getLogger("outlast.checkpoint")
_VERDICT_S = 10.0
"""How long a rank waits, once it has voted, to hear whether the step was committed."""
_FIRST_POLL_S, _LAST_POLL_S = 0.005, 0.25
_PER_FILE_BYTES = 12_288
"""What a file takes on a disk besides its bytes, at most: its directory, its entry, and the rest of its last block."""


class StorageSave(SaveJob):
    """One save of one rank into the store.

    Args:
        context: who saves, and where to.
        request: what to save.
        source: of the plan's parts.
    """

    def __init__(self, context: SaveContext, request: SaveRequest, source: Source) -> None:
        super().__init__(context, request, source, STORAGE, context.config.commit_timeout_s)
        plan = request.plan
        self._save = context.attempt_id, request.save_id
        # Of all ranks, with the overhead of files: as if each rank had as many files as this one.
        files = 1 + len(plan.documents) + len(plan.parts)
        self._total_bytes = plan.replicated_bytes + (plan.local_bytes + files * _PER_FILE_BYTES) * context.world_size
        self._writer = Writer(
            context.store,
            step_name(self.step),
            plan.documents,
            source,
            context.io,
            self._check_cancelled,
            self.give_up,
            self.sign,
        )
        self._voted = False
        self._flagged = False
        """Whether another rank has told all that the save failed."""
        self.committed = False
        """Whether the step is committed (coordinator), or this rank's part durable (others); final once done."""

    def give_up(self, reason: Exception) -> None:
        """See :class:`SaveJob`."""
        super().give_up(self._cause(reason))

    def _cause(self, error: Exception) -> Exception:
        """The error, or that the process is ending: the threads of storage clients refuse work then."""
        if isinstance(error, RuntimeError) and process_exit.exiting():
            return process_ended(f" ({error})")
        return error

    def signs(self) -> int:
        """See :class:`Background`; what the threads do that write files counts."""
        return super().signs() + self._context.io.answers

    def _where(self) -> str:
        return self._context.store.url

    # The save's own thread from here on.

    def _run(self) -> None:
        finished = False
        try:
            size_bytes = self._write_and_vote()
            if self._context.rank == 0:
                self._commit()
            else:
                self._hear_verdict()
            finished = self.committed = True
            self._ends()
            self._context.on_event(
                CheckpointSaved(
                    step=self.step,
                    committed=self._context.rank == 0,
                    size_bytes=size_bytes,
                    blocked_s=self.blocked_s,
                    predicted_stall_s=self.predicted_stall_s,
                    durable_s=time.monotonic() - self._request.began,
                )
            )
            if self._context.rank == 0:
                self._remove_old()
        except Exception as error:
            # The thread ends here: the error becomes an event, or is raised in the training thread.
            if finished:
                self.error = error
            else:
                self._fail(self._stop or self._cause(error))
        finally:
            self._end()

    def _remove_old(self) -> None:
        try:
            catalog.retire(self._context.store, self.step)
            retention.prune(self._context.store, self.step, self._context.config.keep_last)
            retention.prune_asides(self._context.store, self.step, self._context.config.aside_keep_last)
        except Exception as error:
            if must_be_raised(error):
                raise
            _log.warning("step %d is committed, but old steps are not removed yet: %s", self.step, error)

    def _fail(self, reason: Exception) -> None:
        self._clean_up(reason)
        self._report(reason)

    def _write_and_vote(self) -> int:
        self._check_cancelled()
        context = self._context
        # Only daemon threads wait: the interpreter does not exit before the pool's threads have ended.
        opened: Future[list[FileEntry]] = Future()
        start(threading.Thread(target=self._open, args=(opened,), name=f"outlast-open-{self.step}", daemon=True))
        entries = self._writer.run(opened)
        context.store.sync_dirs(f"{step_name(self.step)}/{entry.path}" for entry in entries)
        self.sign()
        self._confirmed.wait()
        self._check_cancelled()
        vote = make_vote(context, self._request, entries)
        self._voted = True
        context.store.put_new(vote_path(self.step, context.rank), seal(vote))
        return sum(entry.size_bytes for entry in entries)

    def _open(self, opened: Future[list[FileEntry]]) -> None:
        try:
            opened.set_result(self._open_for_all() if self._context.rank == 0 else self._wait_opened())
        except Exception as error:  # raised where the result is read
            opened.set_exception(error)

    def _open_for_all(self) -> list[FileEntry]:
        context = self._context
        context.lease.confirm()
        self.sign()
        for name in context.store.names(""):
            flag = parse_failed(name)
            if flag is not None and (flag[0] != context.attempt_id or flag[1] < self._request.save_id - 1):
                context.store.remove(name)
        for old in catalog.clear_for(context.store, self.step, context.attempt_id):
            reason = f"saved again; the old one is kept as {old} until the new one is committed, then as .aside-N"
            context.on_event(CheckpointRejected(step=self.step, reason=reason, damaged=False))
        self.sign()
        self._make_room()
        data = self._request.root_document(context)
        self._writer.files.add(node_path(""))
        context.store.put_new(f"{step_name(self.step)}/{node_path('')}", data)
        return [FileEntry(node_path(""), len(data), crc_hex(data), False)]

    def _wait_opened(self) -> list[FileEntry]:
        poll = Poll(self._context.config.commit_timeout_s)
        while True:
            self._check_cancelled(others=True)
            opened = catalog.opened_by(self._context.store, self.step)
            if opened == self._save:
                return []
            if opened is not None and opened[0] == self._save[0] and opened[1] > self._save[1]:
                own, self._save = self._save[1], opened  # rank 0 looks for a flag of its own save
                raise other_count(self.step, own, opened[1])
            if not poll.pause():
                raise not_opened(self.step, poll.limit_s)

    def _make_room(self) -> None:
        """Check for enough room before anything is written; if there is too little, prune old steps.

        Raises:
            OSError: there is still too little.
        """
        store = self._context.store
        free_bytes = store.free_bytes()
        if free_bytes is None or free_bytes >= self._total_bytes:
            return
        retention.prune_all_but_newest_valid(store, self._context.io)
        free_bytes = store.free_bytes() or 0
        if free_bytes < self._total_bytes:
            raise OSError(
                errno.ENOSPC,
                f"No space left on device: the save of step {self.step} needs {self._total_bytes} bytes, "
                f"{free_bytes} are free",
                store.url,
            )

    def _commit(self) -> None:
        store, folder = self._context.store, step_name(self.step)
        votes = self._collect()
        commit = build_commit(votes, self._request.plan.digest)
        sizes = store.sizes(folder)
        for vote in [received.vote for received in votes]:
            for entry in vote.files:
                if sizes.get(entry.path) != entry.size_bytes:
                    raise CheckpointError(
                        f"rank {vote.rank} voted for {folder}/{entry.path} with {entry.size_bytes} bytes, "
                        f"the store has {sizes.get(entry.path, 'no such file')}"
                    )
        # The ranks made the entries of their votes in votes/ durable, but not that of votes/ itself.
        store.sync_dirs([vote_path(self.step, 0)])
        opened = catalog.opened_by(store, self.step)
        if opened != self._save:
            other = f"attempt {opened[0]}, save {opened[1]}" if opened is not None else "nobody"
            raise CheckpointError(f"step {self.step} was opened again meanwhile, by {other}: this save is over")
        self._context.lease.confirm()
        store.put_new(f"{folder}/{COMMIT}", seal(commit))

    def _collect(self) -> list[ReceivedVote]:
        """All ranks' votes, by rank."""
        ranks = range(self._context.world_size)
        votes: dict[int, ReceivedVote] = {}
        refused: dict[int, str] = {}
        poll = Poll(self._context.config.commit_timeout_s)
        while True:
            for rank in [rank for rank in ranks if rank not in votes]:
                try:
                    data = bytes(self._context.store.read(vote_path(self.step, rank)))
                    votes[rank] = read_vote(data, rank, self._context, self._request)
                except FileNotFoundError:
                    continue
                except Fault as fault:
                    refused[rank] = str(fault)
            if len(votes) == len(ranks):
                return [votes[rank] for rank in ranks]
            self._check_cancelled(others=True)
            if not poll.pause():
                absent = [rank for rank in ranks if rank not in votes]
                known = {entry.path for received in votes.values() for entry in received.vote.files}
                known |= {vote_path(self.step, rank).partition("/")[2] for rank in ranks} | {node_path("")}
                written = self._context.store.sizes(step_name(self.step)).keys() - known
                raise no_vote(self.step, poll.limit_s, absent, refused, written)

    def _hear_verdict(self) -> None:
        """Wait for the commit, or for rank 0's reason against it.

        Rank 0 may be gone, or slow: this rank's part is durable, which is all that it reports without a verdict.
        """
        store, commit = self._context.store, f"{step_name(self.step)}/{COMMIT}"
        poll = Poll(min(_VERDICT_S, self._context.config.commit_timeout_s))
        while not store.exists(commit):
            self._check_others()
            # If this rank gives up now, e.g. because its process ends, that changes nothing any more.
            if self._stop is not None or not poll.pause():
                return

    def _check_cancelled(self, *, others: bool = False) -> None:
        """Raise if this save was given up, on this rank or (``others``) on another."""
        super()._check_cancelled()
        if others:
            self._check_others()

    def _check_others(self) -> None:
        flagged = self._context.store.exists(self._flag())
        self.sign()
        if flagged:
            self._flagged = True
            reason = bytes(self._context.store.read(self._flag())).decode(errors="replace")
            why = f": {reason}" if reason else ""
            raise CheckpointError(f"another rank gave up the save of step {self.step}{why}", "see its events for more")

    def _flag(self) -> str:
        return failed_name(self.step, *self._save)

    def _clean_up(self, reason: Exception) -> None:
        """Remove what this rank wrote, beginning with what makes it count, and leave a flag for the other ranks."""
        try:
            self._remove_own()
        except (OSError, MemoryError) as error:
            _log.warning("files of the failed save of step %d could not be removed yet: %s", self.step, error)
        if self._context.world_size > 1 and not self._flagged:
            try:
                self._context.store.put(self._flag(), [failure_text(reason).encode()])
            except (OSError, MemoryError) as error:
                _log.warning("could not flag for the other ranks that step %d failed: %s", self.step, error)

    def _remove_own(self) -> None:
        store, folder, rank = self._context.store, step_name(self.step), self._context.rank
        if not self._writer.files or (self._voted and rank != 0):
            # Rank 0 may have counted the vote, so its files stay until rank 0 clears the step away.
            return
        if catalog.opened_by(store, self.step) not in (self._save, None):
            return  # the folder now belongs to another attempt
        if rank == 0:
            store.remove(f"{folder}/{COMMIT}")
        store.remove(vote_path(self.step, rank))
        # File by file: other ranks write into the same groups. Rank 0 clears empty folders away with its next save.
        for path in sorted(self._writer.files):
            store.remove(f"{folder}/{path}")


class Poll:
    """Waits with pauses that grow, up to a limit in all."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._pause_s = _FIRST_POLL_S

    def pause(self) -> bool:
        """Pause; False if the limit is reached."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(self._pause_s, left_s))
        self._pause_s = min(self._pause_s * 1.5, _LAST_POLL_S)
        return True
