"""What a save works with: store, place in it, and the ranks that take part."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from outlast.checkpoint.config import CheckpointConfig
from outlast.checkpoint.storage.base import Store
from outlast.events import Event


@dataclass(frozen=True)
class SaveContext:
    """Who saves what, and where to."""

    store: Store
    config: CheckpointConfig
    rank: int
    world_size: int
    attempt_id: str
    on_event: Callable[[Event], None]
    io: ThreadPoolExecutor
