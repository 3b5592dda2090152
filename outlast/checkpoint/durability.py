"""What of a run is in storage, as its checkpoint events say."""

from __future__ import annotations

import threading
from collections.abc import Callable

from outlast.errors import NotDurable
from outlast.events import CheckpointFailed, CheckpointRestored, CheckpointSaved, Event


class Durability:
    """The step that was committed in storage last, or restored from there, and the one that should be and is not.

    Thread-safe.

    Args:
        then: is given each event, too.
    """

    def __init__(self, then: Callable[[Event], None]) -> None:
        self._then = then
        self._committed: int | None = None
        """On rank 0; on other ranks the last of which this rank's part is durable."""
        self._failed: CheckpointFailed | None = None
        self._lock = threading.Lock()

    def on_event(self, event: Event) -> None:
        """Take in one of the checkpointer's events."""
        with self._lock:
            if isinstance(event, CheckpointSaved) and event.tier == "storage":
                self._committed, self._failed = event.step, None
            elif isinstance(event, CheckpointRestored) and event.tiers.get("storage"):
                self._committed = event.step
            elif isinstance(event, CheckpointFailed) and event.tier == "storage":
                self._failed = event
        self._then(event)

    def check(self) -> None:
        """After the last save has ended.

        Raises:
            NotDurable: the last save to storage failed; says of which step, why, and what is durable.
        """
        with self._lock:
            failed = self._failed
            if failed is None:
                return
            last = self._committed
            there = "nothing that this process saved is" if last is None else f"the newest that is: step {last}"
        raise NotDurable(
            f"step {failed.step} is not durable ({there}): {failed.reason}",
            "remove what the reason names and resume from there, which repeats the steps since",
        )
