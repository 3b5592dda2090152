"""Who left the order of collectives, where ranks died of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from outlast.diagnostics.live import Collective, Ring
from outlast.diagnostics.live.mismatch import find_mismatch

STEP = [("all_reduce", 900), ("all_gather", 500), ("all_reduce", 4)]
ORDER = STEP * 5
Entry = tuple[str, int]


def ring(rank: int, entries: Sequence[Entry], group: str = "0", later_s: float = 0.0) -> Ring:
    records = tuple(
        Collective(
            seq=seq + 3,
            op=op,
            label="",
            nbytes=nbytes,
            step=1,
            entered_s=100.0 + seq + later_s,
            completed_s=None,
            group=group,
            group_seq=seq + 1,
        )
        for seq, (op, nbytes) in enumerate(entries)
    )
    return Ring(rank, 4000 + rank, 512, len(records), records, ())


SKIPPED = [*ORDER, STEP[0], STEP[2]]
"""The all-gather is left out."""
RIGHT = [*ORDER, STEP[0], STEP[1]]


@pytest.mark.parametrize(
    ("left", "aborted", "certain", "named"),
    [
        ([ring(1, SKIPPED)], {0}, False, 1),  # its peer was aborted
        ([ring(0, RIGHT)], {1}, True, 1),  # it was aborted
        ([ring(0, RIGHT)], {1}, False, None),  # the abort may be of another kind
        ([ring(0, RIGHT), ring(2, RIGHT)], {1}, True, 1),
        ([ring(0, RIGHT), ring(2, RIGHT)], {1, 3}, True, None),  # one of two
        ([ring(1, SKIPPED), ring(2, RIGHT)], {0}, False, 1),
        ([ring(0, RIGHT), ring(1, RIGHT), ring(2, SKIPPED)], set(), False, 2),  # nobody was aborted
        ([ring(0, RIGHT), ring(1, RIGHT)], set(), False, None),
        ([ring(0, RIGHT), ring(1, RIGHT[:-1])], set(), False, None),  # late is not out of order
        ([ring(0, [STEP[0]])], {1}, True, None),  # nothing came before
        ([ring(1, [STEP[1]]), ring(0, [STEP[0]]), ring(2, [STEP[0]])], {3}, False, 1),
        ([ring(0, [("scatter", 64)]), ring(1, [("scatter", 0)])], {2}, False, None),  # only the root has an input
        ([ring(0, RIGHT, "a"), ring(1, SKIPPED, "b")], set(), False, None),  # of different groups
        ([ring(0, RIGHT, "p2p 0"), ring(1, SKIPPED, "p2p 0")], {2}, True, None),  # not numbered alike
        ([], {0}, True, None),
    ],
)
def test_who_left(left: list[Ring], aborted: set[int], certain: bool, named: int | None) -> None:
    found = find_mismatch(left, aborted, certain=certain)
    assert (found.first if found else None) == named, found
    if found is not None:
        assert found.evidence.startswith(f"desynchronised: rank {named} left the order of collectives")


def test_what_is_said() -> None:
    found = find_mismatch([ring(1, SKIPPED)], {0}, certain=True)
    assert found is not None
    assert "its collective #17 was all_reduce of 4 bytes in step 1, where all_gather of 500 bytes" in found.evidence
    assert "rank 0, which kept to it, was aborted" in found.evidence
