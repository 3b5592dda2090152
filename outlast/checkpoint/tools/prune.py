"""Removing old steps by hand, never the newest one that can be restored."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from outlast.checkpoint.storage.base import Store
from outlast.checkpoint.storage.open import open_store
from outlast.checkpoint.tools.inspect import StepInfo, Verification, list_steps, verify
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
    """Of all its files."""


@dataclass(frozen=True)
class Pruning:
    """What was removed, and what was not."""

    url: str
    dry_run: bool
    """Whether nothing was removed, only looked at."""
    removed: tuple[Removal, ...]
    """Oldest first."""
    kept: tuple[int, ...]
    """Committed steps that are left, oldest first."""
    damaged: tuple[Verification, ...]
    """The steps newer than the newest that verifies, newest first; they are kept. Empty as well if nothing is to go:
    then nothing is verified."""

    @property
    def size_bytes(self) -> int:
        """Of all that was removed."""
        return sum(removal.size_bytes for removal in self.removed)


def prune(
    url: str | os.PathLike[str],
    keep_last: int,
    *,
    aside: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> Pruning:
    """Remove committed steps until the ``keep_last`` newest are left.

    Before anything goes, the newest steps are verified, newest first, until one is good: that one, and all that are
    newer, stay whatever ``keep_last`` says. Steps whose commit record is damaged or of another format version are
    neither counted nor removed.

    Args:
        url: where checkpoints lie.
        keep_last: how many, at least 1.
        aside: also remove what was set aside, and saves that were cut off. A save that runs at this moment looks like
            one that was cut off and would fail: use it while no training saves there.
        dry_run: remove nothing.
        progress: called with the step that is verified, bytes verified so far and in all.

    Raises:
        OutOfRange: ``keep_last`` is less than 1.
        CheckpointNotFound: there is no committed step.
        CorruptCheckpoint: none of the committed steps verifies; nothing was removed.
        CheckpointError: the place cannot be read, or something cannot be removed; tells what is gone by then.
    """
    if keep_last < 1:
        raise OutOfRange(f"keep-last = {keep_last}", "keep-last >= 1: the newest checkpoint is never removed")
    store = open_store(url)
    found = list_steps(url)
    committed = [info for info in found if info.status == "committed"]
    if not committed:
        raise CheckpointNotFound(f"no committed steps at {store.url}", "nothing was removed; `outlast ckpt ls` lists")
    going: list[StepInfo] = committed[:-keep_last]
    damaged: list[Verification] = []
    if aside:
        going += [info for info in found if info.status in ("aside", "uncommitted")]
    if going:
        good = _newest_good([info.step for info in committed], url, damaged, progress)
        going = [info for info in going if info.status != "committed" or info.step < good]
    try:
        removals = [_removal(store, info) for info in sorted(going, key=lambda info: (info.step, info.folder))]
    except OSError as error:
        raise CheckpointError(f"{store.url} cannot be read: {error}", "nothing was removed") from error
    if not dry_run:
        _remove(store, removals)
    gone = {removal.step for removal in removals if removal.kind == "committed"}
    kept = tuple(info.step for info in committed if info.step not in gone)
    return Pruning(store.url, dry_run, tuple(removals), kept, tuple(damaged))


def _newest_good(
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
            gone = ", ".join(r.folder for r in removals[:index])
            raise CheckpointError(
                f"{store.url}/{removal.folder} cannot be removed: {error}",
                f"removed before it: {gone}" if gone else "nothing was removed before it; see to the permissions",
            ) from error
