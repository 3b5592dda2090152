"""A restore: candidates are chosen, and the first valid one is loaded. Nothing is changed.

What the run has to put in order before it goes on from there is returned.
"""

from __future__ import annotations

import logging
from typing import Literal

from outlast.checkpoint.format.names import COMMIT, step_name
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.restore.candidates import newest_first, of_step
from outlast.checkpoint.restore.housekeeping import NO_STEP, Settlement, find_steps, records_of
from outlast.checkpoint.restore.load import Loader, Restored
from outlast.checkpoint.restore.request import RestoreContext, RestoreRequest
from outlast.checkpoint.restore.survey import Survey
from outlast.checkpoint.steps.catalog import Scan
from outlast.checkpoint.steps.reader import as_error
from outlast.errors import CorruptCheckpoint

_log = logging.getLogger("outlast.checkpoint")


def restore(
    which: Literal["auto"] | int, context: RestoreContext, request: RestoreRequest, survey: Survey | None
) -> tuple[Restored | None, Settlement]:
    """Load the newest valid step, or the step asked for; collective over the context's agreement.

    Args:
        which: ``"auto"``, or a step.
        context: of this rank.
        request: equal on all ranks, see :func:`agree_on_request`.
        survey: of the nodes; None: there is no tier but storage.

    Returns:
        The state, or None if there is no step at all, and what to do when the run goes on from there.

    Raises:
        CheckpointError: see :meth:`Checkpointer.restore`. What one rank finds, every rank raises.
    """
    found, reading = find_steps(context)
    loader = Loader(reading, request, survey)
    if which != "auto":
        restored = restore_step(which, loader, found)
        newer = [other for other in found.committed if other > which]
        _report_uncommitted(context, found)
        for other in newer:
            context.report(
                other,
                f"newer than the restored step {which}; if the run goes on from there, it is kept under another name",
            )
        return restored, Settlement(context, survey, found, which, superseded=records_of(reading, newer))
    newest, damaged = restore_newest(loader, found)
    _report_uncommitted(context, found)
    step = newest.step if newest is not None else NO_STEP
    return newest, Settlement(context, survey, found, step, damaged=records_of(reading, damaged))


def _report_uncommitted(context: RestoreContext, found: Scan) -> None:
    for step in found.uncommitted:
        if found.committed and step < found.committed[-1]:
            # Steps are saved in order and removed oldest first: this one was being removed when the process was killed,
            # or its save failed, which was told at the time.
            _log.info("%s: incomplete and older than a committed step; not used", step_name(step))
            continue
        reason = "the save was cut off before its commit record, or is in progress: it is not used"
        context.report(step, reason, COMMIT)


def restore_newest(loader: Loader, found: Scan) -> tuple[Restored | None, list[int]]:
    """The newest valid step, None if there is no step at all; and the newer damaged ones. Collective."""
    context, survey = loader.context, loader.survey
    damaged: dict[int, list[Fault]] = {}
    for candidate in newest_first(found, survey.saves() if survey is not None else []):
        outcome = loader.load(candidate)
        if isinstance(outcome, Restored):
            return outcome, list(damaged)
        context.report_faults(candidate.step, outcome)
        if candidate.on_nodes is None:
            damaged[candidate.step] = outcome
    if damaged:
        # Nothing is set aside here: the next start must find the same and stop as well, not start over from nothing.
        lines = [f"step {step}: {fault}" for step, faults in damaged.items() for fault in faults]
        raise CorruptCheckpoint(
            f"{context.store.url}: there are checkpoints, but none is valid:\n  " + "\n  ".join(lines),
            "nothing was changed; repair one, or move them away to start over",
        )
    # What a node's memory has lost cannot be repaired, so it is no reason to stop.
    return None, []


def restore_step(step: int, loader: Loader, found: Scan) -> Restored:
    """One step; collective."""
    context, survey = loader.context, loader.survey
    saves = survey.saves() if survey is not None else []
    for candidate in of_step(step, found, saves, context.store):
        outcome = loader.load(candidate)
        if isinstance(outcome, Restored):
            return outcome
        if candidate.on_nodes is None:
            raise as_error(outcome[0], context.store, step)
        context.report_faults(step, outcome)
    raise AssertionError("the last candidate is restored or raises")
