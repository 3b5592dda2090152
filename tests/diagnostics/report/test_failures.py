"""The first line of a report is the worst that happened; what one failure left is one story with its cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.diagnostics import Report, build_report, render_html
from outlast.diagnostics.report.summary import headline
from outlast.events import CheckpointFailed, CheckpointRejected, Event, RunEnded, WorkersFailed, WorkersStarted
from tests.diagnostics.report.synthetic import SyntheticRun
from tests.diagnostics.report.test_stalls import first_line

LOST = "CommError: all_gather of bucket 0 failed: Connection closed by peer [127.0.0.1]:20401"


def said(run_dir: Path) -> tuple[Report, str]:
    """The report and its headline, which is the same on the page and on a terminal, and red on the page."""
    report = build_report(run_dir)
    first, _ = headline(report)
    page = render_html(report)
    assert f"<h2>{first}" in page
    assert 'class="verdict bad"' in page
    assert first_line(run_dir) == f"{first}."
    assert "No straggler" not in first
    return report, first


def test_a_killed_rank_that_was_restarted(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path, ranks=2)
    run.start()
    run.train(1, 22)
    run.write(run.logs[0], RunEnded(step=22, ok=False, reason=LOST))  # a victim: it ends first
    run.t += 0.3
    run.fail(1, generation=0, step=23)
    run.start(generation=1, first_step=21)
    run.train(21, 60)
    run.end()
    report, first = said(tmp_path)
    assert first == "Rank 1 on node-a killed (SIGKILL) at 11.2 s, after step 22; 5.07 s and 2 steps lost; recovered"
    (failure,) = report.failures
    assert (failure.steps_lost, failure.resumed_step, failure.by_hand) == (2, 21, False)


def test_all_ranks_killed_with_their_launcher_and_started_again_by_hand(tmp_path: Path) -> None:
    """Nobody was left to tell: the ranks' last events and the next start do."""
    run = SyntheticRun(run_dir=tmp_path, ranks=2)
    run.start()
    run.train(1, 25)
    for log in run.logs:
        log.close()
    run.t += 3600
    cut_off = CheckpointRejected(step=25, reason="the save was cut off before its commit record", damaged=False)
    run.start(first_step=21, rejected=cut_off)
    run.train(21, 60)
    run.end()
    report, first = said(tmp_path)
    assert first.startswith("Both ranks on node-a died without a word at ")
    assert first.endswith(", after step 25; 4.28 s and 5 steps lost; resumed by hand")
    (unused,) = (one for one in report.incidents if one.kind == "checkpoint_rejected")
    assert unused.title == "the checkpoint of step 25 was not used"


def test_a_rank_killed_under_torchrun(tmp_path: Path) -> None:
    """Without outlast's launcher: one rank is silent, the others lost the connection to it."""
    run = SyntheticRun(run_dir=tmp_path, ranks=4)
    run.start()
    run.train(1, 25)
    for rank in (0, 1, 3):
        run.write(run.logs[rank], RunEnded(step=25, ok=False, reason=LOST))
    for log in run.logs:
        log.close()
    _, first = said(tmp_path)
    assert first == "Rank 2 on node-b died without a word at 11.8 s, after step 25; not restarted"


def test_a_run_that_may_still_run_has_no_failure(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path, ranks=2)
    run.start()
    run.train(1, 25)
    assert build_report(tmp_path).failures == ()
    assert headline(build_report(tmp_path))[0] == "No straggler"


def test_of_several_the_worst(tmp_path: Path) -> None:
    """The kill that cost 9 steps, not the first; and one from which the run did not recover, whatever others cost."""
    run = SyntheticRun(run_dir=tmp_path, ranks=2)
    run.start()
    run.train(1, 11)
    run.fail(0, generation=0, step=12)
    run.start(generation=1, first_step=11)
    run.train(11, 29)
    run.fail(1, generation=1, step=30)
    run.start(generation=2, first_step=21)
    run.train(21, 60)
    run.end()
    report, first = said(tmp_path)
    assert [one.steps_lost for one in report.failures] == [1, 9]
    assert first.startswith("Rank 1 on node-a killed (SIGKILL)")
    assert first.endswith("9 steps lost; recovered; the worst of 2 failures")
    reasons = ("exited with status 1: OSError: x",) * 2
    run.launcher(WorkersFailed(host="node-a", ranks=(0, 1), reasons=reasons, restarting=False), generation=2)
    assert said(tmp_path)[1].startswith("Ranks 0, 1 on node-a exited with status 1 at ")
    assert said(tmp_path)[1].endswith(", after step 60: OSError: x; not restarted; the worst of 3 failures")


def test_restarted_and_failed_before_a_step(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path, ranks=2)
    run.start()
    run.train(1, 11)
    run.fail(0, generation=0, step=12)
    run.launcher(WorkersStarted(host="node-a", ranks=(0, 1), pids=(1, 2), restarts_left=0), generation=1)
    run.t += 2
    run.launcher(
        WorkersFailed(host="node-a", ranks=(0,), reasons=("exited with status 1: no GPU",), restarting=False),
        generation=1,
    )
    report, first = said(tmp_path)
    assert [one.outcome for one in report.failures] == ["restarted, but no step was done since", "not restarted"]
    assert first.startswith("Rank 0 on node-a killed (SIGKILL) at ")


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (
            CheckpointFailed(step=20, reason="no vote of rank 3"),
            "The checkpoint of step 20 was not committed: no vote of rank 3",
        ),
        (
            CheckpointRejected(step=20, reason="CorruptCheckpoint: x"),
            "The checkpoint of step 20 was rejected: CorruptChe",
        ),
        (
            RunEnded(step=60, ok=False, reason="ValueError: x"),
            "Rank 0 failed at 23.0 s, at step 60: ValueError: x; not restart",
        ),
    ],
)
def test_whatever_happened_stands_above_no_straggler(tmp_path: Path, event: Event, words: str) -> None:
    run = SyntheticRun(run_dir=tmp_path, ranks=2)
    run.start()
    run.train(1, 60)
    run.write(run.logs[0], event)
    if not isinstance(event, RunEnded):
        run.end()
    assert said(tmp_path)[1].startswith(words)


def test_a_loss_that_is_not_finite_is_worse_than_a_kill_that_healed(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path, ranks=2)
    run.start()
    run.train(1, 11)
    run.fail(0, generation=0, step=12)
    run.start(generation=1, first_step=11)
    run.train(11, 59)
    assert said(tmp_path)[1].startswith("Rank 0 on node-a killed")
    for log in run.logs:
        log.close()
    path = run.logs[0].path
    lines = path.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if '"step":59' in line and '"kind":"step"' in line)
    before, _, rest = lines[at].partition('"loss":')
    lines[at] = f'{before}"loss":NaN{rest[rest.index(",") :]}'
    path.write_text("\n".join(lines) + "\n")
    assert said(tmp_path)[1].startswith("Training loss is NaN or infinite from step 59 on, on rank 0")
