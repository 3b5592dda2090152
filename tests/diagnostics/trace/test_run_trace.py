from __future__ import annotations

import gzip
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outlast.cli.main import main
from outlast.diagnostics.trace.run_trace import write_trace
from outlast.errors import DiagnosticsError
from outlast.events import ProgramStep
from tests.diagnostics.report.synthetic import SyntheticRun, clean, eventful
from tests.diagnostics.trace.event_format import check
from tests.diagnostics.trace.failing_run import CULPRIT, hanging
from tests.diagnostics.trace.perfetto import query

ARROWS = """
select here.name as wait, from_thread.name as waiter, there.name as mark, to_thread.name as culprit,
  here.ts <= there.ts as forward, here.dur as wait_ns
from flow join slice here on here.id = slice_out join slice there on there.id = slice_in
join thread_track from_track on from_track.id = here.track_id
join thread from_thread on from_thread.utid = from_track.utid
join thread_track to_track on to_track.id = there.track_id
join thread to_thread on to_thread.utid = to_track.utid
order by to_thread.name, from_thread.name
"""
PROBLEMS = "select name, value from stats where value > 0 and (severity != 'info' or name glob 'flow*')"


def of(events: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """By the names of threads, process and thread."""
    return {
        one["args"]["name"]: (one["pid"], one["tid"])
        for one in events
        if one["ph"] == "M" and one["name"] == "thread_name"
    }


@pytest.mark.slow
def test_perfetto_imports_it_without_an_error_and_draws_the_waits(tmp_path: Path) -> None:
    hanging(tmp_path / "run", late_s={1: 0.05})
    trace = tmp_path / "trace.json"
    assert write_trace(tmp_path / "run", trace).missing == ()
    problems, arrows, threads, steps, hung, counters = query(
        trace,
        tmp_path,
        PROBLEMS,
        ARROWS,
        "select process.name as node, thread.name as thread from thread join process using (upid) "
        "where thread.name not null order by 1, 2",
        "select count(*) as n, count(distinct name) as steps from slice where name glob 'step *'",
        "select dur, extract_arg(arg_set_id, 'args.why') as why from slice where name = 'hung'",
        "select t.name, count(*) as n, min(value) as least from counter join counter_track t on t.id = track_id "
        "group by 1 order by 1",
    )
    assert problems == []
    waits = [(one["waiter"], one["culprit"], one["wait"]) for one in arrows]
    assert waits == [
        *((f"rank {rank}", "rank 1", "communication") for rank in (0, 2, 3)),
        *((f"rank {rank}", "rank 2", "waits in all_reduce #41") for rank in (0, 1, 3)),
    ]
    assert all(one["forward"] and one["mark"] == "waited for" for one in arrows)
    assert all(abs(one["wait_ns"] - 10.1e9) < 0.3e9 for one in arrows if one["culprit"] == f"rank {CULPRIT}")
    places = {(one["node"], one["thread"]) for one in threads}
    assert {("node node-a", "rank 0"), ("node node-a", "rank 1 collectives"), ("node node-b", "rank 2")} <= places
    assert ("run run", "incidents") in places
    assert ("node node-a", "rank 2") not in places
    assert steps == [{"n": 4 * (20 + 10), "steps": 30}]
    (one,) = hung
    assert one["dur"] == pytest.approx(10.3e9, rel=1e-3)
    assert "3 peers have been waiting" in one["why"]
    assert [(one["name"], one["n"]) for one in counters] == [("loss value", 30), ("step time (s) value", 30)]
    assert counters[1]["least"] > 0.2


STEP = {"ph": "X", "pid": 1, "tid": 1, "ts": 5, "dur": 5, "name": "step", "cat": "step"}
NAME = {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "rank 0"}}
ARROW = {"ph": "f", "bp": "e", "pid": 1, "tid": 1, "ts": 6, "id": 1, "name": "waits", "cat": "waits"}


@pytest.mark.slow
def test_perfetto_tells_of_an_arrow_that_comes_from_nowhere(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [NAME, STEP, ARROW]}))
    (problems,) = query(trace, tmp_path, PROBLEMS)
    assert [one["name"] for one in problems] == ["flow_end_without_start"]


def test_the_rules_refuse_what_breaks_them() -> None:
    check(json.dumps({"traceEvents": [NAME, STEP]}))
    outside = ARROW | {"ts": 10}
    for events in (
        [STEP],
        [NAME, STEP, ARROW],
        [NAME, STEP, ARROW | {"ph": "s"}, outside],
        [NAME, STEP, STEP | {"ts": 7}],
        [NAME, STEP, STEP | {"ts": 1, "dur": 1}],
        [NAME, STEP | {"dur": 0}],
        [NAME, STEP | {"args": {"loss": float("nan")}}],
    ):
        with pytest.raises(AssertionError):
            check(json.dumps({"traceEvents": events}))


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0, 0.7])
def test_waits_are_drawn_where_a_clock_is_wrong_and_its_launcher_told_by_how_much(
    tmp_path: Path, ahead_s: float
) -> None:
    hanging(tmp_path / "run", late_s={1: 0.05}, ahead_s=ahead_s)
    written = write_trace(tmp_path / "run", tmp_path / "trace.json")
    assert (written.arrows, written.missing) == (6, ())
    slices = [one for one in check((tmp_path / "trace.json").read_text()) if one["ph"] == "X"]
    (hung,) = (one for one in slices if one["name"] == "hung")
    waits = [one for one in slices if one["name"].startswith("waits in")]
    assert len(waits) == 3
    assert all(abs(one["ts"] + one["dur"] - hung["ts"] - hung["dur"]) < 10 for one in waits)


def test_everything_that_happened_is_there(tmp_path: Path) -> None:
    eventful(tmp_path / "run")
    trace = tmp_path / "trace.json.gz"
    assert main(["report", str(tmp_path / "run"), "--trace", str(trace)]) == 0
    events = check(gzip.decompress(trace.read_bytes()).decode())
    threads = of(events)
    incidents = {one["name"] for one in events if one["ph"] == "i"}
    assert {"rank 3 hung in step 49", "rank 1 failed on node-a", "training resumed with step 31"} <= incidents
    assert "ranks 0–3 restarted on 2 hosts" in incidents
    slices = {(one["pid"], one["tid"], one["name"]) for one in events if one["ph"] == "X"}
    for rank in range(4):
        mine = threads[f"rank {rank}"]
        assert {(*mine, name) for name in ("step 1", "data", "forward and backward", "evaluation")} <= slices
        assert (*mine, "restore of step 30") in slices
        assert (*threads[f"rank {rank} checkpoints"], "checkpoint of step 60 to storage") in slices
    assert (*threads["rank 3"], "hung") in slices
    assert (*threads["rank 1"], "failed") in slices
    assert not [one for one in events if one["ph"] in "sf"], "nobody knows who waited"


def test_steps_and_their_parts_are_as_long_as_they_were(tmp_path: Path) -> None:
    clean(tmp_path / "run", ranks=1, ranks_per_host=1, steps=12, eval_every=100)
    write_trace(tmp_path / "run", tmp_path / "trace.json")
    events = check((tmp_path / "trace.json").read_text())
    told = [
        json.loads(line) for line in (tmp_path / "run/attempts/0001/events/rank_00000.jsonl").read_text().splitlines()
    ]
    steps = [one for one in told if one["kind"] == "step"]
    slices = [one for one in events if one["ph"] == "X"]
    for step in steps:
        (whole,) = (one for one in slices if one["name"] == f"step {step['step']}")
        assert whole["dur"] == pytest.approx(step["step_s"] * 1e6, abs=1)
        inside = [one for one in slices if one["cat"] == "part" and 0 <= one["ts"] - whole["ts"] < whole["dur"]]
        lengths = {one["name"]: one["dur"] for one in inside}
        assert sum(lengths.values()) == whole["dur"]
        assert lengths["data"] == pytest.approx(step["data_s"] * 1e6, abs=1)
        assert lengths["communication"] == pytest.approx(step["comm_s"] * 1e6, abs=1)
    ends = [one["ts"] + one["dur"] for one in slices if one["name"].startswith("step ")]
    times = [one["t"] for one in steps]
    assert ends[-1] - ends[0] == pytest.approx((times[-1] - times[0]) * 1e6, abs=5)


def test_a_clock_that_was_set_back_moves_slices_and_is_told(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path / "run", ranks=2, steps=20)
    run.start()
    run.train(1, 10)
    run.t -= 100.0
    run.train(11, 20)
    run.end()
    written = write_trace(tmp_path / "run", tmp_path / "trace.json")
    events = check((tmp_path / "trace.json").read_text())
    assert {one["name"] for one in events if one["ph"] == "X"} >= {f"step {step}" for step in range(1, 21)}
    assert any("a clock was set back" in one for one in written.missing), written.missing


def test_a_program_that_tells_nothing_of_itself(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path / "run", ranks=2)
    run.start()
    for step in range(1, 6):
        run.t += 0.5
        for log in run.logs:
            run.write(log, ProgramStep(step=step, step_s=0.5, collective_s=0.1))
    run.end()
    write_trace(tmp_path / "run", tmp_path / "trace.json")
    events = check((tmp_path / "trace.json").read_text())
    assert sum(one["name"].startswith("step ") and one["ph"] == "X" for one in events) == 10
    assert "nan" not in (tmp_path / "trace.json").read_text().lower()


def test_values_that_are_not_finite_are_no_json_and_are_left_out(tmp_path: Path) -> None:
    clean(tmp_path / "run", ranks=1, ranks_per_host=1, steps=6)
    path = tmp_path / "run/attempts/0001/events/rank_00000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step" and line["step"] == 4:
            line["loss"] = float("nan")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_trace(tmp_path / "run", tmp_path / "trace.json")
    events = check((tmp_path / "trace.json").read_text())
    assert sum(one["name"] == "loss" for one in events) == 5
    assert any(one["name"] == "training loss is NaN or infinite from step 4 on" for one in events)


def test_a_torn_line_and_hostile_names_cost_nothing_else(tmp_path: Path) -> None:
    run = SyntheticRun(run_dir=tmp_path / "run", ranks=2, steps=12)
    run.start(hosts=['node "a"\\</script>', "node-b"])
    run.train(1, 12)
    run.end()
    path = tmp_path / "run/attempts/0001/events/rank_00001.jsonl"
    path.write_bytes(path.read_bytes() + b'{"v":1,"t":17')
    written = write_trace(tmp_path / "run", tmp_path / "trace.json")
    events = check((tmp_path / "trace.json").read_text())
    assert any(one["ph"] == "M" and one["args"] == {"name": 'node node "a"\\</script>'} for one in events)
    assert any("last line is incomplete" in one for one in written.missing)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    clean(tmp_path / "run", ranks=1, ranks_per_host=1, steps=4)
    with pytest.raises(DiagnosticsError, match="does not exist"):
        write_trace(tmp_path / "run", tmp_path / "absent" / "trace.json")
    with pytest.raises(DiagnosticsError, match="no run directory"):
        write_trace(tmp_path / "absent", tmp_path / "trace.json")
    trace = tmp_path / "trace.json"
    trace.write_text("old")
    kept = tmp_path / "run/events/agent_node-a.jsonl"
    line = {"v": 1, "t": 1.79e9, "rank": -1, "generation": 0, "kind": "collectives_kept", "of_rank": 0, "entered": 1}
    kept.write_text(json.dumps(line | {"newest": [[1, 2]]}) + "\n")
    with pytest.raises(DiagnosticsError, match="cannot be read"):
        write_trace(tmp_path / "run", trace)
    assert trace.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "trace.json"]


def test_a_disk_that_fills_up_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    clean(tmp_path / "run", ranks=2, steps=400)
    limit = 50_000

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [
        sys.executable,
        "-m",
        "outlast",
        "report",
        str(tmp_path / "run"),
        "--trace",
        str(tmp_path / "t.json"),
    ]
    done = subprocess.run(command, preexec_fn=small, capture_output=True, text=True)
    assert done.returncode != 0
    assert "cannot be written: File too large" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
