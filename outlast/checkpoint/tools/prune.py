"""Removing old steps by hand, but never the newest one that can be restored."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.open import open_store
from outlast.checkpoint.tools.inspect import StepInfo, Verification, list_steps, verify
from outlast.checkpoint.tools.open_step import where_steps_are
from outlast.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, OutOfRange


@dataclass(frozen=True)
class Removal:
    """One folder that was removed, or would be."""

    folder: str
    """Its name below the URL."""
    step: int
    kind: Literal["committed", "aside", "cut off"]
    """``cut off``: a save without a commit record."""
    size_bytes: int
    """Total size of its files."""


@dataclass(frozen=True)
class Pruning:
    """What was removed, and what was kept."""

    url: str
    dry_run: bool
    """Whether nothing was removed."""
    removed: tuple[Removal, ...]
    """Oldest first."""
    kept: tuple[int, ...]
    """Committed steps that remain, oldest first."""
    damaged: tuple[Verification, ...]
    """The steps newer than the newest that verifies, newest first; they are kept. Also empty if there was nothing to
    remove: then nothing is verified."""

    @property
    def size_bytes(self) -> int:
        """Total size of what was removed."""
        return sum(removal.size_bytes for removal in self.removed)


def prune(
    url: str | os.PathLike[str],
    keep_last: int,
    *,
    aside: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> Pruning:
    """Remove all committed steps but the ``keep_last`` newest.

    Before anything is removed, steps are verified, newest first, until one is valid: that one and all newer ones are
    kept, whatever ``keep_last`` says. Steps whose commit record is damaged or of another format version are neither
    counted nor removed.

    Args:
        url: of the checkpoints.
        keep_last: how many to keep, at least 1.
        aside: also remove what was kept as ``step_….aside-N``, and saves that were cut off. A running save looks like
            one that was cut off and would fail: use this only while no training saves there.
        dry_run: remove nothing.
        progress: called with the step that is being verified, and the bytes verified so far and in total.

    Raises:
        OutOfRange: ``keep_last`` is less than 1.
        CheckpointNotFound: there is no committed step.
        CorruptCheckpoint: none of the committed steps verifies; nothing was removed.
        CheckpointError: the storage cannot be read, or a step cannot be removed; says what was removed by then.
    """
    if keep_last < 1:
        raise OutOfRange(f"keep-last = {keep_last}", "keep-last >= 1: the newest checkpoint is never removed")
    store = open_store(url)
    steps = list_steps(url)
    committed = [info for info in steps if info.status == "committed"]
    if not committed:
        raise CheckpointNotFound(f"no committed steps at {store.url}", f"nothing was removed; {where_steps_are(store)}")
    obsolete: list[StepInfo] = committed[:-keep_last]
    damaged: list[Verification] = []
    if aside:
        obsolete += [info for info in steps if info.status in ("aside", "uncommitted")]
    if obsolete:
        newest_valid = _newest_valid([info.step for info in committed], url, damaged, progress)
        obsolete = [info for info in obsolete if info.status != "committed" or info.step < newest_valid]
    try:
        removals = [_removal(store, info) for info in sorted(obsolete, key=lambda info: (info.step, info.folder))]
    except OSError as error:
        raise CheckpointError(f"{store.url} cannot be read: {error}", "nothing was removed") from error
    if not dry_run:
        _remove(store, removals)
    removed = {removal.step for removal in removals if removal.kind == "committed"}
    kept = tuple(info.step for info in committed if info.step not in removed)
    return Pruning(store.url, dry_run, tuple(removals), kept, tuple(damaged))


def _newest_valid(
    committed: list[int],
    url: str | os.PathLike[str],
    damaged: list[Verification],
    progress: Callable[[int, int, int], None] | None,
) -> int:
    for step in reversed(committed):
        result = verify(url, step, None if progress is None else _of_step(progress, step))
        if result.ok:
            return step
        damaged.append(result)
    problems = [f"step {bad.step}: {bad.problems[0].file}: {bad.problems[0].reason}" for bad in damaged]
    raise CorruptCheckpoint(
        f"none of the committed steps at {url} verifies:\n  " + "\n  ".join(problems),
        "nothing was removed; `outlast ckpt verify` lists all damaged files",
    )


def _of_step(progress: Callable[[int, int, int], None], step: int) -> Callable[[int, int], None]:
    return lambda done, total: progress(step, done, total)


def _removal(store: Store, info: StepInfo) -> Removal:
    kind: Literal["committed", "aside", "cut off"]
    kind = "committed" if info.status == "committed" else "aside" if info.status == "aside" else "cut off"
    return Removal(info.folder, info.step, kind, sum(store.sizes(info.folder).values()))


def _remove(store: Store, removals: list[Removal]) -> None:
    for index, removal in enumerate(removals):
        try:
            store.remove_tree(removal.folder)
        except OSError as error:
            removed = ", ".join(earlier.folder for earlier in removals[:index])
            raise CheckpointError(
                f"{store.url}/{removal.folder} cannot be removed: {error}",
                f"removed before it: {removed}" if removed else "nothing was removed before it; check the permissions",
            ) from error
