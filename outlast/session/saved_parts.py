"""What a loop has to know of a run's newest checkpoint before its models exist, such as its place in its data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from outlast.checkpoint import CheckpointConfig, load
from outlast.errors import CheckpointNotFound
from outlast.session.place import run_path
from outlast.session.settings import checkpoint_settings


def newest_parts(
    run: str | os.PathLike[str] | None,
    *,
    checkpoint: CheckpointConfig | Mapping[str, Any] | Literal[False] | None = None,
    resume: Literal["auto", "never"] | int = "auto",
) -> tuple[int, dict[str, Any]]:
    """The parts that :meth:`Session.add` named as replicated, as the newest checkpoint has them; nothing is restored.

    Only these parts are read, and verified. The session that follows verifies all of the step, so it may take an older
    one: compare the step that its :meth:`Session.begin` returns. A copy that is in memory alone
    (``memory_every_steps``) is not looked at, so it may also take a newer one.

    Call it before the session is made, on all ranks of the default process group, if there is one.

    Args:
        run: as for :class:`Session`.
        checkpoint: as for :class:`Session`; False finds nothing.
        resume: as for :class:`Session`; "never" finds nothing.

    Returns:
        The step, and the parts' state by name; 0 and nothing if there is no checkpoint.

    Raises:
        CorruptCheckpoint: there are checkpoints, and these parts are damaged in all of them.
        CheckpointNotFound: there is no such step.
        StateMismatch: the checkpoint has no such parts.
        CheckpointError: the storage cannot be read.
        ConfigError: a setting is wrong.
    """
    config = checkpoint_settings(checkpoint)
    if config is None or resume == "never":
        return 0, {}
    url = config.url if config.url is not None else str(run_path(run) / "checkpoints")
    try:
        restored = load(url, "newest" if resume == "auto" else resume, parts=("parts",))
    except CheckpointNotFound:
        if resume == "auto":
            return 0, {}
        raise
    return restored.step, restored.replicated["parts"]
