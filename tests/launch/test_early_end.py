"""A rank that ends with status 0 in the middle of training is the first cause of what its peers suffer."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.launch import LaunchConfig
from outlast.launch.hang_watch import HangWatch
from tests.helpers import events, tiny_config, wait_for
from tests.launch.jobs import HERE, RANK, finish, start
from tests.launch.test_hang_watch import Ranks


def test_a_rank_that_leaves_is_told_before_its_victim(tmp_path: Path) -> None:
    """A program that beats; its peer fails with a closed connection."""
    run = tmp_path / "run"
    words = (RANK, str(run), "8", "--rank", "1", "--at", "4", "--do", "exit:0", "--once")
    said = finish(start(run, *words, hang_floor_s=60.0), run)
    assert "rank 0 of 2 done in generation 1" in said
    (failed,) = events(run, "workers_failed")
    assert failed["ranks"] == [1, 0]
    assert failed["reasons"][0].startswith("exited with status 0 in phase step of step 4, before training was done")
    assert said.index("outlast: rank 1 (pid ") < said.index("outlast: rank 0 (pid ")


def test_ranks_that_end_early_together_have_ended(tmp_path: Path) -> None:
    """A program of somebody's own, which does not say that it finishes."""
    run = tmp_path / "run"
    finish(start(run, RANK, str(run), "8", "--at", "4", "--do", "exit:0", "--all"), run)
    assert events(run, "workers_failed") == []


@pytest.mark.parametrize(("how", "ranks"), [("_exit", "2"), ("exit", "2"), ("_exit", "1")])
def test_the_trainers_data_leave(tmp_path: Path, how: str, ranks: str) -> None:
    """With one rank there is no victim either, and a job that did not train to its end is no success."""
    config, run = tiny_config(tmp_path)
    rank = int(ranks) - 1
    words = (str(HERE / "leaving_rank.py"), str(rank), "3", how, str(config), "--trainer.steps", "4")
    more = {"obeys_notice": True, "hang_floor_s": 60.0, "max_restarts": 0}
    said = finish(start(run, *words, flags={"nproc_per_node": ranks}, **more), run, status=1)
    (failed,) = events(run, "workers_failed")
    assert failed["ranks"][0] == rank
    if how == "exit":
        cause = "EndedEarly: rank 1 called sys.exit() in step 3 of 4, before training was done"
        assert cause in failed["reasons"][0]
    else:
        cause = "exited with status 0 in phase data of step 3, before training was done"
        assert failed["reasons"][0].startswith(cause)
    assert cause in said[said.index("RanksFailed: ranks failed after 0 of 0 restarts") :].splitlines()[1]


def test_a_peer_that_waits_for_a_rank_that_left(tmp_path: Path, root: Path) -> None:
    """Not every transport notices that a peer is gone; so the watch does."""
    ranks = Ranks(HangWatch(tmp_path, LaunchConfig(hang_floor_s=0.4, patience=1000.0)), root)
    try:
        pids = ranks.start("step inside", "data")
        ranks.processes[1].kill()
        ranks.processes[1].wait(60)
        assert ranks.watch.ended_early([1]) == {1: "in phase data of step 5"}
        wait_for(lambda: ranks.watch.is_stuck({0: pids[0]}))
        assert ranks.watch.find_hung({0: pids[0]}, alone=True) == (), "and long before its victim is blamed"
    finally:
        ranks.end()


def test_a_rank_that_finished_has_not_left(tmp_path: Path, root: Path) -> None:
    ranks = Ranks(HangWatch(tmp_path, LaunchConfig()), root)
    try:
        ranks.start("finish", "step")
        assert ranks.watch.ended_early([0]) == {}
        assert ranks.watch.ended_early([0, 1]) == {1: "in phase step of step 5"}
    finally:
        ranks.end()
