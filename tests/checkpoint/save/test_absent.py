"""A save that some rank never called says so, and not that the storage is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.save.absent import no_vote
from outlast.checkpoint.tools import verify
from outlast.events import Event
from tests.checkpoint.helpers import checkpointer, failed
from tests.checkpoint.ranks import Orders, run
from tests.checkpoint.states import local, state


def save(tmp_path: Path, calls: list[tuple[int, ...]], **settings: Any) -> list[list[str]]:
    """Ranks call ``save`` for these steps; why saves failed, by rank."""
    events: list[list[Event]] = [[] for _ in calls]
    savers = [
        checkpointer(tmp_path, events[rank], rank=rank, world_size=len(calls), commit_timeout_s=1.0, **settings)
        for rank in range(len(calls))
    ]
    for step in sorted({step for steps in calls for step in steps}):
        called = [rank for rank, steps in enumerate(calls) if step in steps]
        for rank in called:
            savers[rank].save(step, replicated=state(step), local=local(step, rank))
        for rank in called:
            savers[rank].wait_copied()
        for rank in called:
            job = savers[rank]._saving
            assert job is not None
            job.join()
    for saver in savers:
        saver.close()
    return [failed(of_rank) for of_rank in events]


def test_on_rank_0_alone_in_processes(tmp_path: Path) -> None:
    """As in ``if rank == 0: checkpointer.save(...)``, which other libraries want."""
    orders = [Orders((str(tmp_path),), "one", save=steps, commit_timeout_s=1.0) for steps in ((1, 20), (1,))]
    outcomes = run(*orders)
    told = [event for event in outcomes[0].events if event["kind"] == "checkpoint_failed"]
    assert [event["reason"] for event in told] == [
        "no vote for step 20 within 1 s: rank 1 never called save(20); every rank must"
    ]


def test_of_three_ranks_those_who_did_not_are_named(tmp_path: Path) -> None:
    zero, *_ = save(tmp_path, [(1, 2), (1, 2), (1,)])
    assert zero == ["no vote for step 2 within 1 s: rank 2 never called save(2); every rank must"]
    assert verify(tmp_path, 1).ok


def test_on_another_rank_alone(tmp_path: Path) -> None:
    zero, one = save(tmp_path, [(1,), (1, 2)])
    assert zero == []
    assert "rank 0 did not open the save of step 2 within 1 s: it never called save(2), which every rank must" in one[0]


def test_with_another_step(tmp_path: Path) -> None:
    zero, one = save(tmp_path, [(1, 20), (1, 21)])
    assert "rank 1 never called save(20)" in zero[0]
    assert "never called save(21)" in one[0]


def test_a_save_that_was_called_more_often_on_rank_0_is_told_at_once(tmp_path: Path) -> None:
    """Ranks number their saves: after one that only rank 0 called, they no longer mean the same one."""
    zero, one = save(tmp_path, [(1, 2, 3), (1, 3)])
    assert "rank 1 never called save(2)" in zero[0]
    told = "the save of step 3 is number 3 on rank 0 and number 2 here: some save was called on rank 0 alone"
    assert f"another rank gave up the save of step 3: {told}" in zero[1]
    assert told in one[0]


@pytest.mark.parametrize(
    ("absent", "refused", "written", "said"),
    [
        ([1], {}, [], "5 s: rank 1 never called save(7); every rank must"),
        ([1, 3], {}, [], "5 s: ranks 1, 3 never called save(7); every rank must"),
        ([1], {}, ["rank_00001/rng/zarr.json"], "5 s from rank 1"),
        ([1], {}, ["packed/rank_00001.0/c.0"], "5 s from rank 1"),
        ([1, 2], {}, ["rank_00001/rng/zarr.json"], "5 s from rank 1; rank 2 never called save(7); every rank must"),
        ([1, 2], {}, ["model/w/c.0"], "5 s from rank 1, rank 2"),
        ([2], {2: "a vote of another save"}, [], "5 s from rank 2 (a vote of another save)"),
    ],
)
def test_what_is_said_follows_from_what_was_written(
    absent: list[int], refused: dict[int, str], written: list[str], said: str
) -> None:
    error = no_vote(7, 5.0, absent, refused, written)
    assert error.what == f"no vote for step 7 within {said}"
    assert ("commit_timeout_s" in error.fix) == ("from" in said)
