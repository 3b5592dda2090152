"""Two real ranks, held up by one cause after the other: each is told beside the late rank, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.diagnostics import DiagnosticsConfig, build_report
from tests.helpers import events, outlast

SCRIPT = Path(__file__).with_name("delayed_program.py")
GAP, LENGTH = 10, 12
EACH = GAP + LENGTH
WORDS = (
    "garbage collection: ",
    "waiting for its data: ",
    "uneven work (batch of 1024 elements against a median of 128)",
)


def steps_of(place: int) -> set[int]:
    """Of the phase at this place, as the run counts steps."""
    first = GAP + place * EACH + 1
    return set(range(first, first + LENGTH))


@pytest.mark.soak
def test_each_cause_is_told_beside_the_rank_that_it_made_late(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = outlast("launch", "--nproc_per_node", "2", "--run-dir", run, SCRIPT, str(GAP), str(LENGTH))
    assert "rank 0 done" in done.stdout
    report = build_report(run, DiagnosticsConfig(stall_min_s=0.3, straggler_min_s=0.05))
    phases = {place: one for one in report.slow_phases for place in range(3) if one.first_step in steps_of(place)}
    assert sorted(phases) == [0, 1, 2], report.slow_phases
    assert len(report.slow_phases) == 3, "what all ranks share accuses nobody"
    for place, words in enumerate(WORDS):
        phase = phases[place]
        assert phase.rank == 1
        assert phase.cause.startswith(words), (place, phase.cause)
        assert phase.last_step in steps_of(place)
    stalls = {one.step: one for one in report.incidents if one.kind == "stall"}
    shared = [one for step, one in stalls.items() if step in steps_of(3)]
    assert shared
    assert all(one.rank is None and "all ranks were slow waiting for data" in one.detail for one in shared)
    (compiled,) = [one for step, one in stalls.items() if step == GAP + 4 * EACH + 1]
    assert compiled.rank == 1
    assert "compilation: " in compiled.detail

    told = [one for one in events(run, "rank_delay") if one["step"] > 3]
    by_rank = {rank: [one for one in told if one.rank == rank] for rank in (0, 1)}
    assert {one["what"] for one in by_rank[0]} <= {"data_wait"}, "nothing is told of the rank that did nothing of it"
    assert {one["step"] for one in by_rank[0]} <= steps_of(3)
    assert {one["step"] for one in by_rank[1] if one["what"] == "garbage_collection"} >= steps_of(0)
    assert {one["step"] for one in by_rank[1] if one["what"] == "data_wait"} == steps_of(1) | steps_of(3)
    assert {one["step"] for one in by_rank[1] if one["what"] == "compile"} == {GAP + 4 * EACH + 1}
