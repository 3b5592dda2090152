"""A restore: candidates are chosen, the first valid one is loaded, and what it leaves behind is cleared away."""

from __future__ import annotations

from typing import Literal

from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.restore.candidates import newest_first, of_step
from outlast.checkpoint.restore.housekeeping import NO_STEP, Housekeeping
from outlast.checkpoint.restore.load import Loader, Restored
from outlast.checkpoint.restore.request import RestoreContext, RestoreRequest
from outlast.checkpoint.restore.survey import Survey
from outlast.checkpoint.steps.reader import as_error
from outlast.errors import CorruptCheckpoint


def restore(
    which: Literal["auto"] | int, context: RestoreContext, request: RestoreRequest, survey: Survey | None
) -> Restored | None:
    """Load the newest valid step, or the step asked for; collective over the context's agreement.

    Args:
        which: ``"auto"``, or a step.
        context: of this rank.
        request: equal on all ranks, see :func:`agree_on_request`.
        survey: of the nodes; None: there is no tier but storage.

    Raises:
        CheckpointError: see :meth:`Checkpointer.restore`. What one rank finds, every rank raises.
    """
    loader, housekeeping = Loader(context, request, survey), Housekeeping(context, survey)
    return restore_newest(loader, housekeeping) if which == "auto" else restore_step(which, loader, housekeeping)


def restore_newest(loader: Loader, housekeeping: Housekeeping) -> Restored | None:
    """The newest valid step; damaged ones are set aside. None if there is no step at all; collective."""
    context, survey = loader.context, loader.survey
    scanned = housekeeping.prepare(None)
    damaged: dict[int, list[Fault]] = {}
    for candidate in newest_first(scanned, survey.saves() if survey is not None else []):
        outcome = loader.load(candidate)
        if isinstance(outcome, Restored):
            housekeeping.finish(scanned, outcome.step, damaged=damaged)
            return outcome
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
    housekeeping.finish(scanned, NO_STEP)
    return None


def restore_step(step: int, loader: Loader, housekeeping: Housekeeping) -> Restored:
    """One step; newer ones are set aside; collective."""
    context, survey = loader.context, loader.survey
    scanned = housekeeping.prepare(step)
    saves = survey.saves() if survey is not None else []
    for candidate in of_step(step, scanned, saves, context.store):
        outcome = loader.load(candidate)
        if isinstance(outcome, Restored):
            newer = [other for other in scanned.committed if other > step]
            housekeeping.finish(scanned, step, superseded=newer)
            return outcome
        if candidate.on_nodes is None:
            raise as_error(outcome[0], context.store, step)
        context.report_faults(step, outcome)
    raise AssertionError("the last candidate is restored or raises")
