"""Goodput by cause: whatever happened, the parts are not negative and add up to the wall time."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.diagnostics import build_report, render_html
from outlast.diagnostics.report.goodput import CAUSES, Goodput, goodput_of
from outlast.diagnostics.report.load import load
from outlast.events import HangFound, Record, WorkersFailed, read_events
from tests.diagnostics.report.synthetic import SyntheticRun
from tests.helpers import events, outlast, start_outlast, tiny_config, wait_for

SECONDS = st.floats(0, 30, allow_nan=False)


def told(t: float, kind: str, rank: int = 0, generation: int = 0, **fields: Any) -> Record:
    return Record(t=t, rank=rank, generation=generation, kind=kind, fields=fields)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[int, Record]], float]:
    """Events of a run that is killed, hangs, is restarted and is started again by hand; and the time between launches
    by hand, in which nobody wrote anything."""
    found: list[tuple[int, Record]] = []
    t, step, paused_s, generation, attempt = 1000.0, 0, 0.0, 0, 0
    for launch in range(draw(st.integers(1, 3))):
        if launch:
            pause_s = draw(SECONDS)
            t, paused_s, generation = t + pause_s, paused_s + pause_s, 0
        for _ in range(draw(st.integers(1, 3))):
            attempt += 1
            found.append((0, told(t, "workers_started", -1, generation, host="h")))
            t += draw(SECONDS)
            for rank in draw(st.permutations((0, 1))):
                found.append((attempt, told(t, "run_started", rank, generation, host="h")))
            if draw(st.booleans()):
                t += draw(SECONDS)
                found.append((attempt, told(t, "eval", 0, generation, seconds=draw(SECONDS))))
            step = max(0, step - draw(st.integers(0, 5)))
            for _ in range(draw(st.integers(0, 6))):
                step += 1
                t += draw(SECONDS)
                # What a step says of itself need not fit to what the clock says.
                fields = {name: draw(SECONDS) for name in ("step_s", "data_s", "checkpoint_s")}
                for rank in draw(st.permutations((0, 1))):
                    found.append((attempt, told(t, "step", rank, generation, step=step, **fields)))
                if draw(st.booleans()):
                    saved = told(t + 1e-3, "checkpoint_saved", 0, generation, step=step, committed=True)
                    found.append((attempt, saved))
            how = draw(st.sampled_from(["ends", "killed", "hang", "silent"]))
            t += draw(SECONDS)
            if how == "ends":
                found += [(attempt, told(t, "run_ended", rank, generation, ok=True)) for rank in (0, 1)]
            if how == "hang":
                found.append((0, told(t, "hang_found", -1, generation, culprit=1, silent_s=draw(SECONDS))))
            if how in ("hang", "killed"):
                t += draw(SECONDS)
                found.append((0, told(t, "workers_failed", -1, generation, ranks=[1], restarting=True)))
            t = max(t if how != "silent" else 0.0, max(record.t for _, record in found))
            if how in ("ends", "silent"):
                break
            generation += 1
            t += draw(SECONDS) if draw(st.booleans()) else 0.0
        t = max(record.t for _, record in found)
    found.sort(key=lambda one: one[1].t)
    return found, paused_s


@given(histories())
def test_parts_add_up_to_the_wall_time(history: tuple[list[tuple[int, Record]], float]) -> None:
    events, paused_s = history
    goodput = Goodput()
    before = dict(goodput.seconds)
    for attempt, record in events:
        goodput.take(attempt, record)
        assert all(goodput.seconds[cause] >= before[cause] for cause in CAUSES), "a counter went back"
        before = dict(goodput.seconds)
    goodput.finish()
    wall_s = events[-1][1].t - events[0][1].t - paused_s
    assert math.fsum(goodput.seconds.values()) == pytest.approx(wall_s, abs=1e-6)
    assert goodput.wall_s == pytest.approx(wall_s, abs=1e-6)
    assert goodput.paused_s == pytest.approx(paused_s, abs=1e-6)
    done, lost = set(), 0  # by the clock alone: what was done again took at most the time between its steps
    for _, record in events:
        if record.kind == "step" and record.rank == 0:
            lost += record["step"] in done
            done.add(record["step"])
    assert bool(lost) >= bool(goodput.seconds["redone"])


KINDS = ["step", "eval", "run_ended", "hang_found", "workers_failed", "run_started", "workers_started", "notice"]
ANY_EVENTS = st.tuples(
    st.floats(0, 100), st.sampled_from(KINDS), st.integers(0, 2), st.integers(0, 3), st.integers(0, 4)
)


@given(st.lists(ANY_EVENTS, max_size=30))
def test_events_in_any_order_break_nothing(events: list[tuple[float, str, int, int, int]]) -> None:
    """Clocks that jump, events that were lost: the parts stay parts of the time that passed."""
    goodput = Goodput()
    for t, kind, rank, generation, attempt in events:
        goodput.take(attempt, told(t, kind, rank, generation, step=attempt, step_s=math.nan, ok=rank == 0))
    goodput.finish()
    assert all(seconds >= 0 for seconds in goodput.seconds.values())
    assert math.fsum(goodput.seconds.values()) == pytest.approx(goodput.wall_s, abs=1e-6)
    assert goodput.wall_s <= 100


def parts(goodput: Goodput) -> dict[str, float]:
    return {cause: round(seconds, 3) for cause, seconds in goodput.seconds.items() if seconds > 1e-9}


def started(at_t: float = 0.0, *, generation: int = 0, attempt: int = 1) -> list[tuple[int, Record]]:
    return [
        (0, told(at_t, "workers_started", -1, generation, host="h")),
        (attempt, told(at_t + 4, "run_started", 0, generation)),
    ]


def step(t: float, number: int, attempt: int = 1, generation: int = 0, step_s: float = 1.0) -> tuple[int, Record]:
    fields = {"step_s": step_s, "data_s": 0.2, "checkpoint_s": 0.1}
    return attempt, told(t, "step", 0, generation, step=number, **fields)


def taken(*events: tuple[int, Record]) -> Goodput:
    goodput = Goodput()
    for attempt, record in events:
        goodput.take(attempt, record)
    goodput.finish()
    return goodput


def test_a_hang_a_restart_and_what_is_done_again() -> None:
    goodput = taken(
        *started(),
        (1, told(7.0, "eval", seconds=2.0)),
        step(8.0, 1),
        step(9.0, 2),
        (0, told(19.0, "hang_found", -1, silent_s=9.5)),
        (0, told(19.5, "workers_failed", -1, ranks=[1])),
        *started(20.0, generation=1, attempt=2),
        step(26.0, 2, attempt=2, generation=1),
        step(27.0, 3, attempt=2, generation=1),
        (2, told(29.0, "run_ended", 0, 1, ok=True)),
    )
    assert parts(goodput) == pytest.approx(
        {
            "startup": 5.0 + 2.0,  # up to the evaluation, and the end
            "evaluation": 2.0,
            "useful": 3 * 0.7,
            "data": 3 * 0.2,
            "checkpoint": 3 * 0.1,
            "hang": 9.5,
            "restart": 0.5 + 0.5 + 0.5 + 4.0 + 1.0,  # the lost part of step 3, and the way back to its first step
            "redone": 1.0,
        }
    )


def test_waiting_for_the_last_save_is_a_checkpoints() -> None:
    goodput = taken(
        *started(),
        step(5.0, 1),
        (1, told(8.0, "checkpoint_saved", 0, step=1, committed=True)),
        (1, told(8.5, "run_ended", 0, ok=True)),
    )
    assert parts(goodput)["checkpoint"] == pytest.approx(0.1 + 3.0)
    assert parts(goodput)["startup"] == pytest.approx(4.0 + 0.5)


def test_a_save_in_the_background_is_no_checkpoints_time() -> None:
    goodput = taken(
        *started(), step(5.0, 1), (1, told(5.5, "checkpoint_saved", 0, step=1, committed=True)), step(6.0, 2)
    )
    assert parts(goodput)["checkpoint"] == pytest.approx(2 * 0.1)


def test_a_pause_between_launches_is_no_wall_time() -> None:
    goodput = taken(*started(), step(5.0, 1), *started(1000.0, attempt=2), step(1005.0, 2, attempt=2))
    assert goodput.paused_s == 995.0
    assert goodput.wall_s == 10.0
    assert parts(goodput)["startup"] == 8.0


def test_without_a_launcher_a_restart_is_known_by_its_generation() -> None:
    goodput = taken(
        (1, told(0.0, "run_started")),
        step(1.0, 1),
        (2, told(31.0, "run_started", generation=1)),
        step(33.0, 1, attempt=2, generation=1),
        (3, told(900.0, "run_started")),
        step(901.0, 2, attempt=3),
    )
    assert parts(goodput)["restart"] == 30.0 + 1.0
    assert parts(goodput)["redone"] == 1.0
    assert goodput.paused_s == 900.0 - 33.0


def test_the_lowest_rank_leads_whoever_speaks_first() -> None:
    goodput = taken(
        (1, told(0.0, "run_started", 1)),
        (1, told(0.5, "run_started", 0)),
        (1, told(2.0, "step", 1, step=1, step_s=1.0)),
        step(2.5, 1),
    )
    assert parts(goodput)["useful"] == pytest.approx(0.7)
    assert parts(goodput)["startup"] == pytest.approx(1.5)


def test_all_wait_for_the_rank_that_waits_for_data() -> None:
    """Whether it tells of the step before the lead does or after it."""
    events = [*started(), step(5.0, 1), step(6.0, 2)]
    waits = [
        (1, told(t, "step", 1, step=n, step_s=1.0, data_s=0.6, checkpoint_s=0.0)) for n, t in ((1, 5.001), (2, 5.9))
    ]
    goodput = taken(*sorted([*events, *waits], key=lambda one: one[1].t))
    assert parts(goodput)["data"] == pytest.approx(1.2)
    assert parts(goodput)["checkpoint"] == pytest.approx(0.2)
    assert parts(goodput)["useful"] == pytest.approx(0.6)


def test_a_report_and_a_run_that_goes_on_agree(tmp_path: Path) -> None:
    """The whole history at once, and event by event."""
    run = SyntheticRun(run_dir=tmp_path, steps=30, stalls={12: ("data", 3.0)}, eval_every=10)
    run.start()
    run.train(1, 30)
    loaded = load(tmp_path)
    goodput = Goodput()
    for folder in sorted((tmp_path / "attempts").glob("0*")):
        records = [one for path in folder.glob("events/*.jsonl") for one in read_events(path)]
        records += [one for path in tmp_path.glob("events/*.jsonl") for one in read_events(path)]
        for record in sorted(records, key=lambda one: one.t):
            goodput.take(0 if record.rank < 0 else int(folder.name), record)
    goodput.finish()
    assert goodput.seconds == pytest.approx(goodput_of(loaded).seconds)
    assert goodput.seconds["data"] > 3.0


def test_two_nodes_that_start_at_about_the_same_time_are_one_start() -> None:
    goodput = taken(
        (0, told(0.0, "workers_started", -1, host="a")),
        (1, told(1.0, "run_started", 0)),
        (0, told(1.5, "workers_started", -1, host="b")),
        (1, told(2.0, "run_started", 1)),
        step(4.0, 1),
    )
    assert goodput.paused_s == 0
    assert parts(goodput) == {"startup": 3.0, "useful": 0.7, "data": 0.2, "checkpoint": 0.1}


def test_the_report_has_the_parts_and_they_add_up(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path, steps=60)
    run.start()
    run.train(1, 35)
    run.t += 12.0
    run.launcher(HangFound(culprit=1, pid=1, step=36, silent_s=11.5, limit_s=8.0, evidence="stopped"), generation=0)
    run.launcher(WorkersFailed(host="node-a", ranks=(1,), reasons=("hung",), restarting=True), generation=0)
    run.t += 1.0
    run.start(generation=1, first_step=31)
    run.train(31, 60)
    report = build_report(tmp_path)
    split = report.goodput
    assert all(seconds >= 0 for seconds in split.parts_s().values())
    assert math.fsum(split.parts_s().values()) == pytest.approx(split.wall_s, rel=1e-9)
    assert split.wall_s == report.facts.wall_s
    assert split.hang_s == pytest.approx(11.5)
    assert split.restart_s > 5.0
    assert report.facts.steps_redone == 5
    assert split.redone_s == pytest.approx(5 * report.facts.median_step_s, rel=0.3)
    assert split.useful_s > 0.5 * report.facts.useful_s
    assert split.startup_s >= 4.0
    plain = json.loads(json.dumps(report.to_json()))["goodput"]
    assert set(plain) == {"wall_s", "shares", *(f"{cause}_s" for cause in CAUSES)}
    assert math.fsum(plain["shares"].values()) == pytest.approx(1.0)
    text, page = outlast("report", tmp_path).stdout, render_html(report)
    for name in ("useful steps", "steps redone", "restarts", "hangs", "start and end"):
        assert name in text
        assert name in page
    assert "waiting for data" in text


@pytest.mark.soak
def test_a_real_run_that_is_killed_once_has_steps_redone_and_a_restart(tmp_path: Path) -> None:
    """Counted by hand from its events: what is redone, and when the first step after the kill was done."""
    config, run = tiny_config(tmp_path)
    words = ("--trainer.steps", "60", "--checkpoint.every-steps", "20")
    job = start_outlast("launch", config, "--nproc-per-node", "2", *words, log=tmp_path / "log")
    try:
        newest = lambda: max((one["step"] for one in events(run, "step")), default=0)  # noqa: E731
        wait_for(lambda: run.exists() and 24 <= newest() <= 34)
        os.kill(events(run, "workers_started")[0]["pids"][1], signal.SIGKILL)
        assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    finally:
        job.kill()
    report = build_report(run)
    split = report.goodput
    assert math.fsum(split.parts_s().values()) == pytest.approx(split.wall_s, rel=1e-9)
    assert all(seconds >= 0 for seconds in split.parts_s().values())
    steps = [one for one in events(run, "step") if one.rank == 0]
    second = [one for one in steps if one.generation == 1]
    lost = [one for one in steps if one.generation == 0 and one["step"] >= second[0]["step"]]
    assert lost, "it was killed right after a checkpoint"
    assert split.redone_s == pytest.approx(second[len(lost) - 1].t - second[0].t + second[0]["step_s"], rel=0.01)
    last_t = max(one.t for one in steps if one.generation == 0)
    assert split.restart_s == pytest.approx(second[0].t - second[0]["step_s"] - last_t, rel=0.01)
    assert split.evaluation_s > 0
    assert split.hang_s == 0
    (measured,) = events(run, "goodput")
    assert measured["seconds"] == pytest.approx(split.parts_s(), abs=0.5), "a peer may end later"
    assert measured["wall_s"] == pytest.approx(sum(measured["seconds"].values()))
