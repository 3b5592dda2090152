"""What of a run is in storage, as its checkpoint events say."""

from __future__ import annotations

import threading

from outlast.errors import NotDurable
from outlast.events import CheckpointFailed, CheckpointSaved, Event


class Durability:
    """The newest step that is committed in storage, and the newest that should be and is not. Thread-safe.

    Args:
        restored: the step that the run went on from, which is in storage already; None if it began anew.
    """

    def __init__(self, restored: int | None = None) -> None:
        self.committed = restored
        """On rank 0; on other ranks the newest of which this rank's part is durable."""
        self._none = "no step of this run is"
        self._failed: CheckpointFailed | None = None
        self._lock = threading.Lock()

    def doubt(self, restored: int) -> None:
        """The run went on from a step that may be in memory alone: it is in storage once it is saved there."""
        with self._lock:
            if self.committed == restored:
                self.committed = None
                self._none = "none that this start saved is"

    def on_event(self, event: Event) -> None:
        """Take in one of the checkpointer's events."""
        with self._lock:
            if isinstance(event, CheckpointSaved) and event.tier == "storage":
                self.committed = max(event.step, -1 if self.committed is None else self.committed)
            elif isinstance(event, CheckpointFailed) and event.tier == "storage":
                self._failed = event

    def check(self, what: str = "training is done") -> None:
        """After the last save has ended.

        Args:
            what: has happened.

        Raises:
            NotDurable: the newest save to storage failed; says of which step, why, and what is durable.
        """
        with self._lock:
            failed = self._failed
            if failed is None or (self.committed is not None and self.committed >= failed.step):
                return
            there = self._none if self.committed is None else f"the newest that is: step {self.committed}"
        raise NotDurable(
            f"{what}, but step {failed.step} is not durable ({there}): {failed.reason}",
            "remove what the reason names and resume with --resume auto, which repeats the steps since",
        )
