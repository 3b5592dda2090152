"""What a rank leaves while it runs: events on disk, its heartbeat and its ring of collectives in shared memory."""

from __future__ import annotations

import logging

from outlast.diagnostics.live.heartbeat import Heartbeat
from outlast.diagnostics.live.recorder import Recorder
from outlast.diagnostics.live.shm import heartbeat_path, remove_if_empty, ring_path, shm_directory
from outlast.diagnostics.live.unwatched import RankUnwatched, mark_unwatched, mark_watched
from outlast.errors import SharedMemoryFull
from outlast.events import EventLog
from outlast.launch.attempt import Attempt

RING_CAPACITY = 512
_LOG = logging.getLogger("outlast.launch")


class RankRecords:
    """Opens all three. Where shared memory has no room, the rank trains unwatched, and says so.

    Args:
        attempt: this start of the run; its folders exist.
        rank: of this process.
        generation: how often the job's ranks were started before.
        ring_capacity: how many collectives the ring holds.

    Raises:
        DiagnosticsError: shared memory cannot be used.
    """

    def __init__(self, attempt: Attempt, rank: int, generation: int, *, ring_capacity: int = RING_CAPACITY) -> None:
        self._folder = shm_directory(attempt.run)
        self._rank = rank
        self._ring_capacity = ring_capacity
        reason = ""
        try:
            self._open(is_private=False)
        except SharedMemoryFull as error:
            reason = str(error)
            heartbeat_path(self._folder, rank).unlink(missing_ok=True)
            mark_unwatched(self._folder, rank)
            self._open(is_private=True)
        else:
            mark_watched(self._folder, rank)
        self.events = EventLog(attempt.events_path(rank), rank=rank, generation=generation)

        if reason:
            _LOG.warning(
                "outlast: rank %d is not watched, and a hang of it is not found; training goes on: %s", rank, reason
            )
            self.events.write(RankUnwatched(reason=reason))

    def _open(self, *, is_private: bool) -> None:
        rank, folder = self._rank, self._folder
        self.heartbeat = Heartbeat(heartbeat_path(folder, rank), rank=rank, is_private=is_private)
        self.recorder = Recorder(
            ring_path(folder, rank), rank=rank, capacity=self._ring_capacity, is_private=is_private
        )

    def remove_shared(self) -> None:
        """Remove what is in shared memory: no launcher reads it, and there is nothing more to be told."""
        self.heartbeat.close(unlink=True)
        self.recorder.close(unlink=True)
        mark_watched(self._folder, self._rank)
        remove_if_empty(self._folder)

    def close(self) -> None:
        """What is in shared memory stays, for whoever reads it."""
        self.heartbeat.close()
        self.recorder.close()
        self.events.close()
