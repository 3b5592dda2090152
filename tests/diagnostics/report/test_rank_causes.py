"""Why a rank was late, as it saw it itself: named where it explains the steps in which it was late, and else not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from outlast.diagnostics import build_report
from outlast.diagnostics.live.step_delays import RankDelay
from outlast.diagnostics.report.delays import Delays, delays_of
from outlast.diagnostics.report.load import Steps, last_executions, load
from outlast.diagnostics.report.rank_causes import RankCauses
from outlast.diagnostics.report.summary import headline
from tests.diagnostics.report.synthetic import SyntheticRun

RANKS, COUNT = 4, 20
AT = np.arange(COUNT)
BEHIND = np.full(COUNT, 0.1)


def steps_with(**columns: object) -> Steps:
    """20 steps of 4 ranks, each of 0.2 s."""
    values = {"step_s": 0.2, "collective_s": 0.05, "data_s": 0.0, "tokens": 0.0, "batch_elements": np.nan} | columns
    arrays = {name: np.broadcast_to(value, (COUNT, RANKS)).astype(float) for name, value in values.items()}
    return Steps(list(range(1, COUNT + 1)), list(range(RANKS)), [1] * COUNT, [0] * COUNT, values=arrays)


def delayed(what: str, seconds: object) -> Delays:
    values = np.broadcast_to(seconds, (COUNT, RANKS)).astype(float)  # type: ignore[call-overload]
    return Delays({what: (values, np.where(values > 0, 3.0, 0.0), np.where(values > 0, 2.0, 0.0))})


NOTHING = Delays({})


def test_collections_in_the_late_steps_are_the_cause() -> None:
    cause = RankCauses(steps_with(), delayed("garbage_collection", [0, 0.1, 0, 0])).of(1, AT, BEHIND)
    assert cause is not None
    assert cause.words == "garbage collection: 2 s in 20 of 20 steps (60 collections, up to generation 2)"


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        ([0.1, 0.1, 0.1, 0.1], "all ranks have as many"),
        ([0.1, 0, 0, 0], "another rank has them"),
        ([0, 0.03, 0, 0], "they are too short"),
        (np.where(AT == 3, 5.0, 0.0)[:, None] * np.eye(4)[1], "they are in one step, and it was late in all"),
    ],
)
def test_collections_that_do_not_explain_it_are_not_named(seconds: object, why: str) -> None:
    assert RankCauses(steps_with(), delayed("garbage_collection", seconds)).of(1, AT, BEHIND) is None, why


def test_what_explains_most_is_named() -> None:
    own = RankCauses(steps_with(data_s=[0.0, 0.06, 0.0, 0.0]), delayed("compile", [0, 0.09, 0, 0]))
    cause = own.of(1, AT, BEHIND)
    assert cause is not None
    assert cause.words == "compilation: 1.8 s in 20 of 20 steps (60 times)"
    cause = RankCauses(steps_with(data_s=[0.01, 0.09, 0.01, 0.01]), NOTHING).of(1, AT, BEHIND)
    assert cause is not None
    assert cause.words == "waiting for its data: 1.8 s in 20 of 20 steps"


def work(own: object) -> Steps:
    """A rank computes for 0.25 s and has so many elements; its peers have 1000, and compute for 0.15 s."""
    elements = np.broadcast_to([1000.0, 0, 1000, 1000], (COUNT, RANKS)).copy()
    elements[:, 1] = own
    return steps_with(collective_s=[0.1, 0.0, 0.1, 0.1], step_s=0.25, batch_elements=elements)


def test_a_rank_with_more_to_do_has_uneven_work() -> None:
    cause = RankCauses(work(1800), NOTHING).of(1, AT, BEHIND)
    assert cause is not None
    assert cause.words == "uneven work (batch of 1800 elements against a median of 1000)"


def test_tokens_are_work_where_nothing_else_is_known() -> None:
    steps = steps_with(collective_s=[0.1, 0.0, 0.1, 0.1], step_s=0.25, tokens=[512, 1024, 512, 512])
    cause = RankCauses(steps, NOTHING).of(1, AT, BEHIND)
    assert cause is not None
    assert cause.name == "uneven work"


def test_longer_batches_now_and_then_are_the_cause_of_lateness_in_the_same_steps_only() -> None:
    often = np.where(AT % 2, 1800.0, 1000.0)
    same, other = np.where(AT % 2, 0.1, 0.0), np.where(AT % 2, 0.0, 0.1)
    assert RankCauses(work(often), NOTHING).of(1, AT, same) is not None
    assert RankCauses(work(often), NOTHING).of(1, AT, other) is None
    assert RankCauses(work(often), NOTHING).of(1, AT, BEHIND) is None, "it is late as well without them"


def test_other_delays_do_not_hide_uneven_work() -> None:
    seconds = np.where(AT < 4, 1.0, 0.0)[:, None] * np.eye(4)[1]
    behind = np.where(AT < 4, 1.0, np.where(AT % 2, 0.1, 0.0))
    own = RankCauses(work(np.where((AT % 2 == 1) & (AT >= 4), 1800.0, 1000.0)), delayed("garbage_collection", seconds))
    late = own.of(1, AT[4:], behind[4:])
    assert late is not None
    assert late.name == "uneven work"
    whole = own.of(1, AT, behind)
    assert whole is not None
    assert whole.name == "garbage collection", "it cost most"


@pytest.mark.parametrize("own", [1000, 1040, 1200, 500, np.nan])
def test_work_that_does_not_explain_it_is_not_named(own: float) -> None:
    assert RankCauses(work(own), NOTHING).of(1, AT, BEHIND) is None


def test_what_all_ranks_do_is_told_of_all() -> None:
    counted = AT >= 3
    seconds = np.where(AT == 10, 2.0, 0.0)[:, None] * np.ones(RANKS)
    assert RankCauses(steps_with(), delayed("compile", seconds)).of_all(AT[10:11], counted, 2.1) == "compiling"
    assert RankCauses(steps_with(), delayed("garbage_collection", seconds)).of_all(AT[10:11], counted, 2.1) == (
        "collecting garbage"
    )
    assert RankCauses(steps_with(), delayed("compile", seconds)).of_all(AT[10:11], counted, 9.0) == ""
    seconds[10, 2] = 0.0
    assert RankCauses(steps_with(), delayed("compile", seconds)).of_all(AT[10:11], counted, 2.1) == ""


def test_the_first_line_and_the_evidence_name_it(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path / "run", late_s={2: 0.08})
    run.start()
    for step in range(1, run.steps + 1):
        delay = RankDelay(step=step, what="garbage_collection", seconds=0.07, count=1, generation_collected=2)
        run.write(run.logs[2], delay)
        if step == 7:  # of a version to come, or damaged
            run.write(run.logs[1], RankDelay(step=step, what="something", seconds=0.07, count=1))
            run.write(run.logs[1], RankDelay(step=step, what="compile", seconds="x", count=1))  # type: ignore[arg-type]
        run.train(step, step)
    run.end()
    report = build_report(run.run_dir)
    first, evidence = headline(report)
    assert first.startswith("Rank 2 on node-b is a straggler")
    assert first.endswith("because of garbage collection")
    assert "; garbage collection: 3.99 s in 57 of 57 steps (57 collections, up to generation 2)" in evidence
    assert json.dumps(report.to_json()["stragglers"][0]["cause"]) == '"garbage collection"'
    assert [one.cause for one in report.stragglers[1:]] == ["", "", ""]


def test_delays_of_executions_that_were_discarded_do_not_count(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path / "run", steps=10)
    run.start()
    for log in run.logs:
        run.write(log, RankDelay(step=5, what="compile", seconds=9.0, count=1))
    run.train(1, 8)
    run.fail(1, generation=0, step=9)
    run.start(generation=1, first_step=5)
    run.write(run.logs[3], RankDelay(step=5, what="compile", seconds=0.5, count=2))
    run.train(5, 10)
    run.end()
    loaded = load(run.run_dir)
    steps = last_executions(loaded.rows)
    seconds = delays_of(loaded, steps).seconds("compile")
    assert seconds is not None
    assert seconds.sum() == 0.5
    assert seconds[steps.steps.index(5), 3] == 0.5
