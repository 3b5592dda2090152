"""The steps that a restore may take, in the order in which it tries them. Equal on all ranks; nothing is read here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from outlast.checkpoint.format.names import COMMIT
from outlast.checkpoint.format.records import Fault
from outlast.checkpoint.restore.survey import SaveOnNodes
from outlast.checkpoint.steps.catalog import Scan
from outlast.checkpoint.steps.reader import as_error
from outlast.checkpoint.storage.base import Store
from outlast.errors import CheckpointNotFound, IncompleteCheckpoint


@dataclass(frozen=True)
class Candidate:
    """One committed save of a step."""

    step: int
    on_nodes: SaveOnNodes | None
    """Which nodes hold it; None: it is read from storage."""


def newest_first(scan: Scan, saves: Sequence[SaveOnNodes]) -> list[Candidate]:
    """All committed saves; of one step those on nodes first.

    Args:
        scan: the steps in storage.
        saves: those on nodes, newest first.
    """
    on_nodes = [Candidate(save.commit.step, save) for save in saves]
    stored = [Candidate(step, None) for step in scan.committed]
    return sorted(on_nodes + stored, key=lambda candidate: candidate.step, reverse=True)


def of_step(step: int, scan: Scan, saves: Sequence[SaveOnNodes], store: Store) -> Iterator[Candidate]:
    """The committed saves of one step, those on nodes first; the last is the one in storage.

    Raises:
        CheckpointNotFound: when the one in storage is reached and there is none; names the steps there are.
        IncompleteCheckpoint: when it is reached and has no commit record.
    """
    yield from (Candidate(step, save) for save in saves if save.commit.step == step)
    if step in scan.uncommitted:
        raise as_error(Fault(IncompleteCheckpoint, COMMIT, "missing: the checkpoint was never completed"), store, step)
    if step not in scan.committed:
        steps = ", ".join(map(str, scan.committed))
        hint = f"committed steps: {steps}" if steps else "there is no checkpoint"
        raise CheckpointNotFound(f"no checkpoint of step {step} at {store.url}", hint)
    yield Candidate(step, None)
