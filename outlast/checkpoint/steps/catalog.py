"""The steps at a URL as a whole: which are there, which is to go, which is set aside."""

from __future__ import annotations

import errno
import json
import logging
from dataclasses import dataclass

from outlast.checkpoint.format.names import (
    COMMIT,
    HEADER,
    NODE,
    parse_aside,
    parse_replaced,
    parse_step,
    replaced_name,
    step_name,
)
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.steps.commit import has_all_votes, read_commit
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointError

_log = logging.getLogger("outlast.checkpoint")


@dataclass(frozen=True)
class Scan:
    """Steps by whether they have a commit record (which need not be a valid one), oldest first."""

    committed: tuple[int, ...]
    uncommitted: tuple[int, ...]


def scan(store: Store) -> Scan:
    """What is there."""
    steps = sorted(step for name in store.names("") if (step := parse_step(name)) is not None)
    done = [step for step in steps if store.exists(f"{step_name(step)}/{COMMIT}")]
    return Scan(tuple(done), tuple(step for step in steps if step not in done))


def opened_by(store: Store, step: int) -> tuple[str, int] | None:
    """Epoch and number of the save that this step was opened for last; None if none, or if it is half there."""
    try:
        header = json.loads(bytes(store.read(f"{step_name(step)}/{NODE}")))["attributes"][HEADER]
        return header["epoch"], header["serial"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def set_aside(store: Store, step: int, *, folder: str = "") -> str:
    """Rename a step's folder so that it is never read again, and nothing of it is lost; returns the new name."""
    taken = [name for name in store.names("") if parse_aside(name) == step]
    number = 1 + max((int(name.rpartition("-")[2]) for name in taken), default=0)
    name = f"{step_name(step)}.aside-{number}"
    store.move_tree(folder or step_name(step), name)
    return name


def clear_leftover(store: Store, step: int) -> str:
    """Remove a step without commit record, or set it aside if it has all votes: only the record may be missing.

    Returns:
        What was done, in words.
    """
    if has_all_votes(store, step):
        return f"it has all votes and was set aside as {set_aside(store, step)}"
    store.remove_tree(step_name(step))
    return "what was written of it was removed"


def clear_for(store: Store, step: int, attempt_id: str) -> list[str]:
    """Make room for saving ``step``: left-overs of all saves that were cut off go, an older commit of it is moved.

    It is not lost before the new one is committed: until :func:`retire`, :func:`bring_back` makes it the step again.

    Returns:
        Names of what was moved because it was committed.

    Raises:
        CheckpointError: this very attempt has committed the step already.
    """
    found = scan(store)
    for other in found.uncommitted:
        _log.info("%s: left by a save that was not completed: %s", step_name(other), clear_leftover(store, other))
    if step not in found.committed:
        return []
    try:
        committed_by = read_commit(store, step).attempt_id
    except Fault:
        committed_by = ""
    if committed_by == attempt_id:
        raise CheckpointError(f"step {step} was saved and committed before in this attempt", "save each step once")
    retire(store, step)
    store.move_tree(step_name(step), replaced_name(step))
    return [replaced_name(step)]


def retire(store: Store, step: int) -> None:
    """Set aside what a committed step has replaced, if anything."""
    old = replaced_name(step)
    try:
        if store.exists(f"{old}/{COMMIT}"):
            set_aside(store, step, folder=old)
        elif store.names(old):
            # Where a folder is moved file by file: the begin, or the end, of a move that was cut off.
            store.remove_tree(old)
    except OSError as error:
        # The new checkpoint is committed all the same; the next restore tries again.
        _log.warning("%s could not be set aside: %s", old, error)


def only_readable(error: OSError) -> bool:
    """Whether something could not be changed because the place can only be read."""
    return isinstance(error, PermissionError) or error.errno == errno.EROFS


def bring_back(store: Store) -> list[tuple[int, str]]:
    """Undo, or complete, what saves left that were to replace a committed step.

    No rank may be saving: one that is late would write into a step that is committed.

    Returns:
        Steps that could not be brought back since the place can only be read, and why, in words.
    """
    left_alone: list[tuple[int, str]] = []
    for name in store.names(""):
        step = parse_replaced(name)
        if step is None:
            continue
        if store.exists(f"{step_name(step)}/{COMMIT}"):
            retire(store, step)
            continue
        try:
            left = clear_leftover(store, step)
            store.move_tree(name, step_name(step))
        except OSError as error:
            if not only_readable(error):
                raise
            left_alone.append((step, f"saving it anew was not completed, and the old one stays {name}: {error}"))
            continue
        _log.warning("%s: saving it anew was not completed, the old one is back; of the new, %s", step_name(step), left)
    return left_alone
