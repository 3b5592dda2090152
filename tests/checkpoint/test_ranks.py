"""Several real processes: they agree on one step, and a rank that is killed in a save costs that save and no more."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.tools import list_steps
from tests.checkpoint.damage import flip, steps_at
from tests.checkpoint.helpers import save_by_ranks
from tests.checkpoint.ranks import Orders, Outcome, run

KILL_POINTS = {
    "rank 0 before it opens the save": (0, "step_00000002/zarr.json"),
    "rank 0 in the middle of its files": (0, "step_00000002/optimizer"),
    "rank 0 before its vote": (0, "step_00000002/votes/rank_00000"),
    "rank 0 before the commit record": (0, "step_00000002/commit.json"),
    "rank 1 before its files": (1, "step_00000002/rank_00001"),
    "rank 1 between its files and its vote": (1, "step_00000002/votes/rank_00001"),
}

AT_ONCE = 4
"""Jobs of the long series."""


def kinds(outcome: Outcome, *wanted: str) -> list[dict[str, Any]]:
    return [event for event in outcome.events if event["kind"] in wanted]


def test_ranks_agree_though_one_ranks_file_is_damaged(tmp_path: Path) -> None:
    urls = []
    for number in range(3):
        url = tmp_path / str(number)
        save_by_ranks(url, 1, 2, 3, world_size=3)
        urls.append(url)
    flip(urls[0] / "step_00000003" / "rank_00002" / "comm" / "w" / "e" / "c")
    (urls[1] / "step_00000003" / "rank_00001" / "zarr.json").unlink()
    flip(urls[1] / "step_00000002" / "model" / "blocks.0.norm.bias" / "c.0")
    for step in (1, 2, 3):
        flip(urls[2] / f"step_0000000{step}" / "votes" / f"rank_0000{step - 1}.json")
    outcomes = run(*[Orders(tuple(map(str, urls)), "two", restore=True)] * 3)
    assert [outcome.exitcode for outcome in outcomes] == [0, 0, 0]
    for outcome in outcomes:
        assert outcome.restored[:2] == [2, 1]
        said = outcome.restored[2]
        assert isinstance(said, str)
        assert said.startswith("CorruptCheckpoint")
        assert "step 3: votes/rank_00002.json" in said
    rejections = [(event["step"], event["file"]) for event in kinds(outcomes[0], "checkpoint_rejected")]
    assert rejections[:3] == [
        (3, "rank_00002/comm/w/e/c"),
        (3, "rank_00001/zarr.json"),
        (2, "model/blocks.0.norm.bias/c.0"),
    ]
    assert all(kinds(outcome, "checkpoint_rejected") == [] for outcome in outcomes[1:])
    for url in urls:  # steps are set aside when the run goes on, and not before
        assert steps_at(url) == ["step_00000001", "step_00000002", "step_00000003"]


def test_a_fault_that_only_one_rank_sees(tmp_path: Path) -> None:
    save_by_ranks(tmp_path, 1, 2, world_size=2)
    fine = Orders((str(tmp_path),), "two", restore=True)
    outcomes = run(fine, replace(fine, misread="step_00000002/model/blocks.0.norm.bias/c.0"))
    assert [outcome.restored for outcome in outcomes] == [[1], [1]]
    (rejection,) = kinds(outcomes[0], "checkpoint_rejected")
    assert (rejection["step"], rejection["file"]) == (2, "model/blocks.0.norm.bias/c.0")


def test_other_numbers_of_ranks_and_empty_places(tmp_path: Path) -> None:
    save_by_ranks(tmp_path / "three", 1, world_size=3)
    outcomes = run(*[Orders((str(tmp_path / "three"), str(tmp_path / "none")), "two", restore=True)] * 2)
    for outcome in outcomes:
        refused, nothing = outcome.restored
        assert str(refused).startswith("StateMismatch")
        assert "saved by 3 ranks, this job has 2" in str(refused)
        assert nothing is None


@pytest.mark.parametrize("ranks", [2, 4])
def test_other_numbers_of_ranks_where_they_are_wanted(tmp_path: Path, ranks: int) -> None:
    save_by_ranks(tmp_path / "a", 1, 2, world_size=3)
    save_by_ranks(tmp_path / "b", 1, 2, world_size=3)
    # Whoever reads them in the end: local files of all three are verified before a step is taken.
    flip(tmp_path / "b" / "step_00000002" / "rank_00002" / "comm" / "w" / "e" / "c")
    orders = Orders((str(tmp_path / "a"), str(tmp_path / "b")), "two", restore=True, any_world_size=True)
    outcomes = run(*[orders] * ranks)
    assert [outcome.restored for outcome in outcomes] == [[2, 1]] * ranks


def test_ranks_killed_at_every_phase_of_a_save(tmp_path: Path) -> None:
    urls = []
    for number, (victim, die_at) in enumerate(KILL_POINTS.values()):
        url = tmp_path / str(number)
        orders = [Orders((str(url),), "one", save=(1, 2), commit_timeout_s=1.0) for _ in range(2)]
        orders[victim] = replace(orders[victim], die_at=die_at)
        outcomes = run(*orders)
        assert outcomes[victim].exitcode == -9, die_at
        survivor = outcomes[1 - victim]
        assert survivor.exitcode == 0
        steps = [(event["kind"], event["step"]) for event in kinds(survivor, "checkpoint_saved", "checkpoint_failed")]
        # Once rank 1 has voted its part is durable; whether the step counts is for rank 0 to say.
        voted = victim == 0 and not die_at.endswith(("zarr.json", "optimizer"))
        if die_at.endswith("optimizer"):
            assert steps[0] == ("checkpoint_saved", 1)
        else:
            assert steps == [("checkpoint_saved", 1), ("checkpoint_saved" if voted else "checkpoint_failed", 2)]
        if victim == 1:
            (told,) = kinds(survivor, "checkpoint_failed")
            assert "no vote for step 2" in told["reason"]
            assert "rank 1" in told["reason"]
        assert [info.step for info in list_steps(url) if info.status == "committed"] == [1]
        urls.append(url)
    outcomes = run(*[Orders(tuple(map(str, urls)), "two", restore=True, save=(2,))] * 2)
    for outcome in outcomes:
        assert outcome.exitcode == 0
        assert outcome.restored == [1] * len(urls)
        assert kinds(outcome, "checkpoint_failed") == []
    left = [event for event in kinds(outcomes[0], "checkpoint_rejected")]
    assert len(left) == len(urls) - 1  # a save that was never opened leaves nothing
    assert {(event["step"], event["file"]) for event in left} == {(2, "commit.json")}
    for url in urls:
        steps = [(info.step, info.status) for info in list_steps(url) if info.status != "aside"]
        assert steps == [(1, "committed"), (2, "committed")]


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["", "fails"])
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_killed_before_every_change_of_a_save(tmp_path: Path, victim: int, fails: str) -> None:
    """The opening, each file, fsyncs of folders, the vote, the record, pruning; of a save that fails, its clearing up.

    The other rank lives on. What both then restore is the last step that was reported as committed, or the one after.
    """

    def killed(number: int) -> tuple[str, int | None, int]:
        """The place, the last step that was reported there, and the victim's exit code."""
        url, said = tmp_path / str(number), tmp_path / f"{number}.acked"
        said.touch()
        common = Orders((str(url),), "one", save=(1, 2), commit_timeout_s=2.0, keep_last=1)
        orders = [replace(common, acked=str(said)), common]
        fail_at = f"step_00000002/rank_0000{victim}/comm" if fails else ""
        orders[victim] = replace(orders[victim], die_before=number, fail_at=fail_at)
        outcomes = run(*orders)
        assert outcomes[1 - victim].exitcode == 0
        return str(url), max(map(int, said.read_text().split()), default=None), outcomes[victim].exitcode

    ends: list[tuple[str, int | None, int]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:  # whoever lives on mostly waits for the commit's limit to pass
        while all(exitcode == -9 for *_, exitcode in ends):
            ends += pool.map(killed, range(len(ends) + 1, len(ends) + 1 + AT_ONCE))
            assert len(ends) < 100
    ends = ends[: 1 + next(i for i, (*_, exitcode) in enumerate(ends) if exitcode != -9)]
    assert ends[-1][2] == 0
    urls, acked = [url for url, *_ in ends], [last for _, last, _ in ends]
    # Rank 0 opens, writes, votes, commits and prunes; rank 1 writes and votes; either fails after a few files.
    assert len(urls) > (5 if fails else 10)
    assert acked[-1] == (1 if fails else 2)
    outcomes = run(*[Orders(tuple(urls), "two", restore=True, save=(3,))] * 2)
    assert [outcome.exitcode for outcome in outcomes] == [0, 0]
    assert outcomes[0].restored == outcomes[1].restored
    for step, last in zip(outcomes[0].restored, acked, strict=True):
        assert step in ((None, 1) if last is None else (last, last + 1)), (step, last)
        assert step in (None, 1, 2)
    assert all(kinds(outcome, "checkpoint_failed") == [] for outcome in outcomes)
    for place in urls:
        assert [info.step for info in list_steps(place) if info.status == "committed"][-1] == 3
    print(f"{len(urls) - 1} kill points, restored {outcomes[0].restored}")
