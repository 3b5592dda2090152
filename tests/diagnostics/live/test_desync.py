"""Which rank left the order of collectives first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from outlast.diagnostics.live import Beat, Collective, Observation, Ring, StallRules, judge

NOW_S = 1000.0
RULES = StallRules(floor_s=10.0, factor=5.0, startup_limit_s=600.0)
STEP = [("all_gather", "bucket 1", 500), ("all_gather", "bucket 0", 900), ("all_reduce", "loss", 4)]
Entry = tuple[str, str, int, int]


def order(steps: int) -> list[Entry]:
    return [(*entry, step) for step in range(1, steps + 1) for entry in STEP]


def rank(number: int, entries: Sequence[Entry], *, silent_s: float = 11.0) -> Observation:
    """A rank that is inside the last of these collectives."""
    records = tuple(
        Collective(
            seq=seq,
            op=op,
            label=label,
            nbytes=nbytes,
            step=step,
            entered_s=NOW_S - silent_s,
            completed_s=None if seq == len(entries) - 1 else NOW_S - silent_s,
        )
        for seq, (op, label, nbytes, step) in enumerate(entries)
    )
    return Observation(
        rank=number,
        pid=4000 + number,
        state="running",
        started_s=0.0,
        beat=Beat(number, 4000 + number, "step", entries[-1][3], NOW_S - silent_s, 0.3),
        ring=Ring(number, 4000 + number, 4096, len(entries), records, ()),
    )


def blamed(*ranks: Observation) -> tuple[int, str]:
    (culprit,) = judge(ranks, RULES, NOW_S).culprits
    assert not culprit.weak
    assert "node" not in culprit.evidence
    return culprit.rank, culprit.evidence


@pytest.mark.parametrize("skipper", [0, 1])
def test_a_rank_that_skips_a_collective(skipper: int) -> None:
    kept = order(4)  # waits in the loss of step 4
    left = [*order(4)[:-1], ("all_gather", "bucket 1", 500, 5)]
    seen = [rank(skipper, left), rank(1 - skipper, kept)]
    name, evidence = blamed(*sorted(seen, key=lambda one: one.rank))
    assert name == skipper
    assert evidence == (
        f"desynchronised: ranks 0 and 1 are in different collectives; rank {skipper} left the order first: its "
        "collective #11 was all_gather 'bucket 1' of 500 bytes in step 5, "
        f"that of rank {1 - skipper} all_reduce 'loss' of 4 bytes in step 4"
    )


def test_a_rank_that_skips_one_in_the_middle_of_a_step() -> None:
    assert blamed(rank(0, order(4)[:-1]), rank(1, [*order(4)[:-2], order(4)[-1]]))[0] == 1


@pytest.mark.parametrize(
    "other",
    [
        ("broadcast", "bucket 0", 900, 4),
        ("all_gather", "bucket 0", 904, 4),
        ("all_gather", "another group's bucket", 900, 4),
    ],
)
def test_another_operation_size_or_group(other: Entry) -> None:
    kept = order(4)[:-1]
    name, evidence = blamed(rank(0, [*kept[:-1], other]), rank(1, kept))
    assert name == 0
    assert f"{other[0]} {other[1]!r} of {other[2]} bytes" in evidence.replace('"', "'") or "group's" in evidence


def test_a_rank_that_takes_one_more_step() -> None:
    end = [*order(4), ("barrier", "end of the run", 0, 4)]
    name, evidence = blamed(rank(0, end), rank(1, order(5)[:13]))
    assert (name, "barrier 'end of the run'" in evidence) == (0, True), "with two, the one that did what it never did"
    name, _ = blamed(rank(0, end), rank(1, order(5)[:13]), rank(2, end))
    assert name == 1, "with three, the one that is alone"


def test_of_three_the_one_that_is_alone() -> None:
    strange = [*order(4)[:-1], ("all_reduce", "mine alone", 4, 4)]
    assert blamed(rank(0, order(4)), rank(1, order(4)), rank(2, strange))[0] == 2


def test_who_is_behind_in_the_same_order_is_not_out_of_order() -> None:
    seen = [rank(0, order(4)), rank(1, order(4)[:-1])]
    assert judge(seen, RULES, NOW_S).culprits == (), "the network may be slow: patience"


def test_two_threads_may_take_turns_differently() -> None:
    one, other = order(4)[:-1], [*order(4)[:-3], order(4)[-2], order(4)[-3]]
    assert judge([rank(0, one), rank(1, other)], RULES, NOW_S).culprits == ()
