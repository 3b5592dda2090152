"""The steps at a URL as a whole: which exist, which are removed, which are set aside."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from outlast.checkpoint.format.fields import (
    Malformed,
    as_count,
    as_mapping,
    as_text,
    member,
    parse,
)
from outlast.checkpoint.format.names import (
    COMMIT,
    EARLIER,
    HEADER,
    NODE,
    parse_aside,
    parse_replaced,
    parse_step,
    replaced_name,
    step_name,
)
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.steps.commit import as_fault, has_all_votes, read_commit
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointError

_log = logging.getLogger("outlast.checkpoint")


@dataclass(frozen=True)
class Scan:
    """The steps with and without a commit record, which need not be valid; oldest first."""

    committed: tuple[int, ...]
    uncommitted: tuple[int, ...]
    replaced: tuple[int, ...] = ()
    """Steps with an older commit that an overwrite has moved away."""


def scan(store: Store) -> Scan:
    """The steps in a store; raises OSError if it cannot be read."""
    names = store.names("")
    steps = sorted(step for name in names if (step := parse_step(name)) is not None)
    replaced = sorted(step for name in names if (step := parse_replaced(name)) is not None)
    committed = [step for step in steps if store.exists(f"{step_name(step)}/{COMMIT}")]
    return Scan(tuple(committed), tuple(step for step in steps if step not in committed), tuple(replaced))


def opened_by(store: Store, step: int) -> tuple[str, int] | None:
    """Epoch and number of the save that this step was opened for last; None if none, or if it is half there."""
    try:
        document = parse(store.read(f"{step_name(step)}/{NODE}"))
        attributes = as_mapping(member(document, "attributes"), "attributes")
        header = as_mapping(member(attributes, HEADER), HEADER)
        return as_text(member(header, "epoch"), "epoch"), as_count(member(header, "serial"), "serial")
    except Malformed:
        return None
    except OSError as error:
        as_fault(error, NODE)  # raises what says nothing about the file
        return None


def set_aside(store: Store, step: int, *, folder: str = "") -> str:
    """Rename a step's folder so that it is never read again and nothing is lost; returns the new name.

    Args:
        store: of the step.
        step: whose folder.
        folder: its name; empty takes that of the step.
    """
    earlier = [name for name in store.names("") if parse_aside(name) == step]
    number = 1 + max((int(name.rpartition("-")[2]) for name in earlier), default=0)
    name = f"{step_name(step)}.aside-{number}"
    store.move_tree(folder or step_name(step), name)
    return name


def move_all_aside(store: Store) -> str:
    """Move all committed steps into a folder of their own, from which they can be restored; returns its name."""
    bring_back(store, scan(store).replaced)
    taken = [int(match[1]) for name in store.names("") if (match := EARLIER.fullmatch(name))]
    folder = f"earlier-{max(taken, default=0) + 1}"
    for step in scan(store).committed:
        store.move_tree(step_name(step), f"{folder}/{step_name(step)}")
    return folder


def clear_leftover(store: Store, step: int) -> str:
    """Remove a step without a commit record, or set it aside if it has all votes: maybe only the record is missing.

    Returns:
        What was done, as the end of a sentence.
    """
    if has_all_votes(store, step):
        return f"it has all votes and is kept as {set_aside(store, step)}, never read"
    store.remove_tree(step_name(step))
    return "its files are removed"


def clear_for(store: Store, step: int, attempt_id: str) -> list[str]:
    """Make room for saving ``step``: remove what interrupted saves left, and move an older commit of the step away.

    The older commit is not lost: until :func:`retire` is called, :func:`bring_back` makes it the step again.

    Returns:
        The new name of the older commit, if there was one.

    Raises:
        CheckpointError: this attempt has already committed the step.
    """
    scanned = scan(store)
    for other in scanned.uncommitted:
        _log.info("%s: left by an interrupted save; %s", step_name(other), clear_leftover(store, other))
    if step not in scanned.committed:
        return []
    try:
        committed_by = read_commit(store, step).attempt_id
    except Fault:
        committed_by = ""
    if committed_by == attempt_id:
        raise CheckpointError(f"this attempt has already saved and committed step {step}", "save each step once")
    retire(store, step)
    store.move_tree(step_name(step), replaced_name(step))
    return [replaced_name(step)]


def retire(store: Store, step: int) -> None:
    """Set aside the older commit that a committed step has replaced, if there is one."""
    old = replaced_name(step)
    try:
        if store.exists(f"{old}/{COMMIT}"):
            set_aside(store, step, folder=old)
        elif store.names(old):
            # Where a folder is moved file by file, an interrupted move leaves a part of it.
            store.remove_tree(old)
    except OSError as error:
        # The new checkpoint is committed nevertheless; the next restore tries again.
        _log.warning("%s cannot be renamed: %s", old, error)


def only_readable(error: OSError) -> bool:
    """Whether a change failed because the storage is read-only."""
    return isinstance(error, PermissionError) or error.errno == errno.EROFS


def bring_back(store: Store, replaced: Iterable[int]) -> list[tuple[int, str]]:
    """Undo interrupted overwrites of committed steps, and complete those that were committed.

    No rank may be saving: a late one would write into a committed step.

    Args:
        store: of the steps.
        replaced: the steps, see :class:`Scan`.

    Returns:
        The steps that cannot be brought back because the storage is read-only, each with the reason.
    """
    left_replaced: list[tuple[int, str]] = []
    for step in replaced:
        name = replaced_name(step)
        if store.exists(f"{step_name(step)}/{COMMIT}"):
            retire(store, step)
            continue
        try:
            outcome = clear_leftover(store, step)
            store.move_tree(name, step_name(step))
        except OSError as error:
            if not only_readable(error):
                raise
            reason = f"overwriting it was interrupted, and its older commit cannot be brought back from {name}: {error}"
            left_replaced.append((step, reason))
            continue
        _log.warning(
            "%s: overwriting it was interrupted; its older commit is back, and of the new one, %s",
            step_name(step),
            outcome,
        )
    return left_replaced
