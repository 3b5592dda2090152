"""Which saves a restore tries, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.checkpoint.format.records import Commit
from outlast.checkpoint.restore.candidates import newest_first, of_step
from outlast.checkpoint.restore.survey import SaveOnNodes
from outlast.checkpoint.steps.catalog import Scan
from outlast.checkpoint.storage.local import LocalStore
from outlast.errors import CheckpointNotFound, IncompleteCheckpoint

SCAN = Scan(committed=(1, 3, 4), uncommitted=(5,))


def on_nodes(step: int, save_id: int = 1) -> SaveOnNodes:
    return SaveOnNodes(Commit(step, 1, "one", save_id, 0.0, 0, ()), {}, {})


def test_newest_first_and_of_one_step_nodes_before_storage() -> None:
    saves = [on_nodes(4, 9), on_nodes(4, 8), on_nodes(2)]
    tried = [(candidate.step, candidate.on_nodes) for candidate in newest_first(SCAN, saves)]
    assert tried == [(4, saves[0]), (4, saves[1]), (4, None), (3, None), (2, saves[2]), (1, None)]


def test_one_step_on_nodes_and_in_storage(tmp_path: Path) -> None:
    saves, store = [on_nodes(4), on_nodes(3)], LocalStore(str(tmp_path))
    assert [candidate.on_nodes for candidate in of_step(4, SCAN, saves, store)] == [saves[0], None]


def test_one_step_that_is_not_in_storage_is_an_error_once_it_is_asked_for(tmp_path: Path) -> None:
    save, store = on_nodes(2), LocalStore(str(tmp_path))
    candidates = of_step(2, SCAN, [save], store)
    assert next(candidates).on_nodes is save
    with pytest.raises(CheckpointNotFound, match="committed steps: 1, 3, 4"):
        next(candidates)
    with pytest.raises(IncompleteCheckpoint, match=r"step_00000005/commit\.json"):
        next(of_step(5, SCAN, [], store))
