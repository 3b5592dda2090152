"""Settings of checkpointing, the section ``[checkpoint]`` of a config file."""

from __future__ import annotations

from dataclasses import dataclass

from outlast.config import require


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often, where to, and how many."""

    every_steps: int = 10
    """Optimizer steps from one checkpoint to the next; the last step of a run is always saved."""

    keep_last: int = 3
    """Committed checkpoints that are kept; older ones are removed after each commit. 0 keeps all. The newest committed
    checkpoint is never removed."""

    url: str | None = None
    """Where checkpoints lie: a path or any fsspec URL (``s3://bucket/run``); none takes the run directory's
    ``checkpoints/``."""

    commit_timeout_s: float = 300.0
    """Seconds the coordinator waits for the votes of the other ranks, and they for the coordinator to open the save.
    When they are over, the save is given up and reported, and training goes on. Larger than the longest time by which
    one rank's storage may lag behind another's."""

    io_threads: int = 4
    """Threads per rank that checksum, write and fsync files (and read and verify them at restore)."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, "checkpoint.every_steps", self.every_steps, "every_steps >= 1")
        require(self.keep_last >= 0, "checkpoint.keep_last", self.keep_last, "keep_last >= 0 (0 keeps all)")
        require(self.commit_timeout_s > 0, "checkpoint.commit_timeout_s", self.commit_timeout_s, "seconds > 0")
        require(1 <= self.io_threads <= 64, "checkpoint.io_threads", self.io_threads, "1 to 64")
