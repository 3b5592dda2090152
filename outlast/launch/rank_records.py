"""What a rank leaves while it runs: events on disk, its heartbeat and its ring of collectives in shared memory."""

from __future__ import annotations

from outlast.diagnostics.live.heartbeat import Heartbeat
from outlast.diagnostics.live.recorder import Recorder
from outlast.diagnostics.live.shm import heartbeat_path, remove_if_empty, ring_path, shm_directory
from outlast.events import EventLog
from outlast.launch.attempt import Attempt

RING_CAPACITY = 512


class RankRecords:
    """Opens all three.

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
        self.heartbeat = Heartbeat(heartbeat_path(self._folder, rank), rank=rank)
        self.recorder = Recorder(ring_path(self._folder, rank), rank=rank, capacity=ring_capacity)
        self.events = EventLog(attempt.events_path(rank), rank=rank, generation=generation)

    def remove_shared(self) -> None:
        """Remove what is in shared memory: no launcher reads it, and there is nothing more to be told."""
        self.heartbeat.close(unlink=True)
        self.recorder.close(unlink=True)
        remove_if_empty(self._folder)

    def close(self) -> None:
        """What is in shared memory stays, for whoever reads it."""
        self.heartbeat.close()
        self.recorder.close()
        self.events.close()
