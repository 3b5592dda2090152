"""Listing what this node's memory holds for some checkpoints, and freeing it; neither needs a run."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from outlast.checkpoint.format.names import PARTNER
from outlast.checkpoint.storage.open import open_store
from outlast.checkpoint.tiers.folders import SHM_ROOT, check_ours, memory_path
from outlast.checkpoint.tiers.run_lock import alone, is_used
from outlast.checkpoint.tiers.slots import commits, holdings
from outlast.errors import CheckpointError


@dataclass(frozen=True)
class StepInMemory:
    """What this node's memory holds of one save."""

    step: int
    epoch: str
    """The attempt that saved it."""
    serial: int
    """Number of the save within the attempt."""
    committed: bool
    """Whether this node has its commit record. A restore takes it if every rank's part is in some node's memory."""
    world_size: int
    """Of the job that saved it."""
    own_ranks: tuple[int, ...]
    """Ranks of this node whose parts are here."""
    partner_ranks: tuple[int, ...]
    """Ranks of another node whose parts were copied here."""
    size_bytes: int
    """Total size of the files in the parts that are here."""


@dataclass(frozen=True)
class InMemory:
    """This node's memory for the checkpoints at a URL."""

    url: str
    folder: str
    in_use: bool
    """Whether a run uses it."""
    steps: tuple[StepInMemory, ...]
    """Oldest first."""
    reserved_bytes: int
    """Its total share of the shared memory, including empty slots and leftovers of saves that were cut off."""


def list_memory(url: str | os.PathLike[str], root: Path = SHM_ROOT) -> InMemory:
    """What this node's memory holds for the checkpoints at a URL; nothing is verified or changed.

    Args:
        url: as the run has it; a path may be relative.
        root: of shared memory.

    Raises:
        CheckpointError: it cannot be read, or is not private to this user.
    """
    where = open_store(url).url
    folder = memory_path(where, root)
    try:
        return _contents(where, folder, is_used(folder))
    except OSError as error:
        raise CheckpointError(f"shared memory {folder} cannot be read: {error}") from error


def remove_memory(url: str | os.PathLike[str], root: Path = SHM_ROOT) -> InMemory:
    """Free what this node's memory holds for the checkpoints at a URL, and return what that was.

    This includes the commit records. Other nodes' memory and the checkpoints at the URL are not touched.

    Args:
        url: as the run has it; a path may be relative.
        root: of shared memory.

    Raises:
        CheckpointError: a run uses it, it cannot be removed, or it is not private to this user.
    """
    where = open_store(url).url
    folder = memory_path(where, root)
    try:
        with alone(folder):
            freed = _contents(where, folder, in_use=False)
            if folder.exists():
                shutil.rmtree(folder)
            return freed
    except OSError as error:
        raise CheckpointError(f"shared memory {folder} cannot be removed: {error}") from error


def _contents(url: str, folder: Path, in_use: bool) -> InMemory:
    if not os.path.lexists(folder):
        return InMemory(url, str(folder), False, (), 0)
    check_ours(folder)
    parts = list(holdings(folder))
    committed = {(commit.attempt_id, commit.save_id) for commit in commits(folder).values()}
    saves = {(part.placed.vote.attempt_id, part.placed.vote.save_id) for part in parts}
    steps = []
    for key in saves:
        of_save = [part for part in parts if (part.placed.vote.attempt_id, part.placed.vote.save_id) == key]
        first = of_save[0].placed.vote
        steps.append(
            StepInMemory(
                first.step,
                first.attempt_id,
                first.save_id,
                key in committed,
                first.world_size,
                tuple(sorted(part.placed.vote.rank for part in of_save if part.tier != PARTNER)),
                tuple(sorted(part.placed.vote.rank for part in of_save if part.tier == PARTNER)),
                sum(entry.size_bytes for part in of_save for entry in part.placed.vote.files),
            )
        )
    steps.sort(key=lambda save: (save.step, save.epoch, save.serial))
    return InMemory(url, str(folder), in_use, tuple(steps), _reserved_bytes(folder))


def _reserved_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            info = path.lstat()
        except FileNotFoundError:  # removed meanwhile
            continue
        total += info.st_blocks * 512 if path.is_file() else 0
    return total
