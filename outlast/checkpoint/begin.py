"""The beginning of a save in the training thread, which fails the save and not the training if memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from outlast.checkpoint.format.names import MEMORY, STORAGE, failed_name
from outlast.checkpoint.memory.arena import Arena
from outlast.checkpoint.save.background import failure_text
from outlast.checkpoint.save.job import SaveJob
from outlast.checkpoint.save.prepare import make_storage_save
from outlast.checkpoint.save.request import SaveContext, SaveRequest
from outlast.checkpoint.shortage import as_os_error
from outlast.checkpoint.tiers.manager import Tiers
from outlast.events import CheckpointFailed

_log = logging.getLogger("outlast.checkpoint")


def begin(
    make_request: Callable[[], SaveRequest],
    context: SaveContext,
    tiers: Tiers | None,
    arena: Arena,
    numbers: tuple[int, int],
    *,
    durable: bool,
) -> SaveJob | None:
    """The save, not started yet. None: there is nothing to start; what failed is reported, and the other ranks know.

    Args:
        make_request: lays the state out.
        context: who saves.
        tiers: None: there is none but storage.
        arena: for a save straight to storage.
        numbers: of the step, and of the save.
        durable: see :class:`SaveRequest`.

    Raises:
        CheckpointError: state that cannot be stored; names it.
        Exception: a bug that ended a copy before, or an error of ``on_event``.
    """
    try:
        request = make_request()
        saving: SaveJob | None = tiers.begin(request) if tiers is not None else None
        if saving is None and durable:
            saving = make_storage_save(context, request, arena)
        return saving
    except Exception as error:
        short = None if isinstance(error, OSError) else as_os_error(error)
        if short is None:
            raise
    _report(context, tiers, *numbers, STORAGE if durable else MEMORY, short)
    return None


def _report(context: SaveContext, tiers: Tiers | None, step: int, save_id: int, tier: str, short: OSError) -> None:
    reason = failure_text(short)
    _log.warning("checkpoint of step %d failed: %s", step, short)
    context.on_event(CheckpointFailed(step=step, reason=reason, tier=tier))
    if tiers is not None:
        tiers.announce_failure(save_id, reason)
    if tier == STORAGE and context.world_size > 1:
        try:
            context.store.put(failed_name(step, context.attempt_id, save_id), [reason.encode()])
        except OSError as error:
            _log.warning("could not flag for the other ranks that step %d failed: %s", step, error)
