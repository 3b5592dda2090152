"""Which old steps are removed, and when."""

from __future__ import annotations

from concurrent.futures import Executor

from outlast.checkpoint.format.names import parse_aside, step_name
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.steps.catalog import _log, scan
from outlast.checkpoint.steps.commit import read_commit
from outlast.checkpoint.steps.reader import StepReader
from outlast.checkpoint.storage.base import Store


def prune(store: Store, newest: int, keep_last: int) -> None:
    """Remove committed steps older than ``newest`` until ``keep_last`` are left, ``newest`` included; 0 keeps all.

    Steps whose record cannot be read (damaged, or of another format version) are neither counted nor removed. A failure
    is logged, not raised.
    """
    if keep_last == 0:
        return
    try:
        older = [step for step in scan(store).committed if step < newest]
        readable = []
        for step in older:
            try:
                read_commit(store, step)
            except Fault as fault:
                _log.warning("%s is kept: %s", step_name(step), fault)
                continue
            readable.append(step)
        for step in readable[: max(0, len(readable) - (keep_last - 1))]:
            store.remove_tree(step_name(step))
    except OSError as error:
        # The new checkpoint is committed nevertheless; the next commit tries again.
        _log.warning("old checkpoints cannot be removed: %s", error)


def prune_asides(store: Store, newest: int, keep_last: int) -> None:
    """Remove steps that were set aside, until the ``keep_last`` of the highest numbers are left; 0 keeps all.

    Only what is older than ``newest``, which is committed, is removed: until then it may be all that is left of a run's
    latest work. A failure is logged, not raised.
    """
    if keep_last == 0:
        return
    try:
        asides = sorted(
            (step, int(name.rpartition("-")[2]), name)
            for name in store.names("")
            if (step := parse_aside(name)) is not None
        )
        for step, _, name in asides[:-keep_last]:
            if step < newest:
                store.remove_tree(name)
                _log.info("%s is removed: a newer step is committed, and %d others are kept", name, keep_last)
    except OSError as error:
        _log.warning("steps that were set aside cannot be removed: %s", error)


def prune_all_but_newest_valid(store: Store, io: Executor) -> None:
    """Remove committed steps older than the newest one that verifies, to make room on a full disk.

    If none verifies, none is removed. Steps whose record cannot be read are kept.
    """
    has_valid = False
    for step in reversed(scan(store).committed):
        try:
            reader = StepReader(store, step, io)
        except Fault as fault:
            _log.warning("%s is kept: %s", step_name(step), fault)
            continue
        if has_valid:
            _log.warning("%s is removed to make room for the next checkpoint", step_name(step))
            store.remove_tree(step_name(step))
        else:
            has_valid = not reader.check(reader.states)
