"""How a process of a session meets the other ranks, and takes the run's directory with them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from outlast.launch import Notice, find_place
from outlast.session import process_group
from outlast.session.agreement import StepAgreement
from outlast.session.place import RunPlace


def join(
    run: str | os.PathLike[str] | None,
    stack: ExitStack,
    *,
    device: torch.device,
    resuming: bool,
    notice_grace_s: float | None,
    timeout_s: float,
) -> RunPlace:
    """Join the process group, unless the program has, and take the directory. Collective; ``stack`` leaves both.

    Args:
        run, notice_grace_s, timeout_s: see :class:`Session`.
        stack: what it closes is this function's doing alone: a group that was there stays.
        device: of the model.
        resuming: a directory with earlier attempts may be used.

    Raises:
        PlaceError, LaunchError, RunDirectoryError: see :class:`Session`.
    """
    notice = None if notice_grace_s is None else stack.enter_context(Notice(notice_grace_s))
    place = find_place()
    if not dist.is_initialized() and place.world_size > 1:
        process_group.start(place, device, timedelta(seconds=timeout_s))
        stack.callback(_leave_group)
    # A group that is there already need not be a launcher's; whoever made it knows.
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    agreement = StepAgreement(rank, world_size, notice)
    place = agreement.of_this_start(replace(place, rank=rank, world_size=world_size))
    return stack.enter_context(RunPlace(run, place, agreement, resuming=resuming))


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
