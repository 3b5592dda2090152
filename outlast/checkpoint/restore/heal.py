"""What a restore surveys in memory, and whether the restored step is in as many nodes as it should be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from outlast.checkpoint.peers.collectives import Agreement
from outlast.checkpoint.restore.survey import Survey
from outlast.checkpoint.tiers.manager import Tiers


def survey_of(tiers: Tiers, rank: int, agreement: Agreement, io: ThreadPoolExecutor) -> Survey:
    """The survey of what the memory and the disks of all nodes hold, for a restore."""
    return Survey(tiers.folder, tiers.disk_folder, tiers.meeting.nodes, rank, agreement, io)


def is_thin(survey: Survey, step: int, copies: int) -> bool:
    """Whether memory holds a step, and some rank's part of it in fewer than ``copies`` nodes; collective."""
    found = [save for save in survey.saves() if save.commit.step == step]
    return bool(found) and any(
        len(found[0].in_memory.get(rank, ())) < copies for rank in range(found[0].commit.world_size)
    )
