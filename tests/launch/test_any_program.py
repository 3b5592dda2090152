"""``outlast launch`` of programs that know nothing of outlast: watched, restarted and reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from outlast.diagnostics import build_report
from outlast.diagnostics.trace.run_trace import write_trace
from tests.diagnostics.trace.event_format import check as check_trace
from tests.forked import Job
from tests.helpers import clean_env, events, outlast, start_outlast, wait_for
from tests.launch.jobs import STARTED

SCRIPT = Path(__file__).with_name("watched_program.py")
QUICK = ("--launch.hang-floor-s", "2", "--launch.monitor-interval-s", "0.2", "--launch.alone-limit-s", "3")
"""A rank that does nothing is awaited for three times the last of these."""


def launch(run: Path, *words: str | Path, check: int = 0) -> str:
    done = outlast("launch", "--nproc_per_node", "2", "--run-dir", run, *QUICK, *words, check=check)
    return done.stdout + done.stderr


def test_a_script_is_restarted_and_its_late_rank_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = launch(run, SCRIPT, "40", "--slow", "1", "--do", "kill")
    assert "rank 0 done" in said
    (failed,) = events(run, "workers_failed")
    assert (failed["ranks"], failed["reasons"], failed["restarting"]) == ([1], ["killed by SIGKILL"], True)
    steps = [(one.generation, one["step"]) for one in events(run, "program_step") if one.rank == 0]
    # The first step of a start has no known beginning; steps are counted on over restarts.
    assert [step for generation, step in steps if generation == 0] == list(range(2, 6))
    assert [step for generation, step in steps if generation == 1] == list(range(7, 46))
    told = [one for one in events(run, "verdict") if one.generation == 1]
    assert [(one["state"], one["ranks"]) for one in told] == [("began", [1]), ("ended", [1])], "while it ran"
    report = build_report(run)
    assert [row.rank for row in report.stragglers if row.straggler] == [1]
    assert report.facts.finished
    assert not report.loss.steps
    text = outlast("report", run).stdout
    assert "killed by SIGKILL" in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("what", "evidence"),
    [
        pytest.param("stop", "stopped (state T), has entered", marks=pytest.mark.soak),
        ("sleep", "last entered all_reduce #"),
    ],
)
def test_a_rank_that_does_nothing_is_found_and_named(tmp_path: Path, what: str, evidence: str) -> None:
    run = tmp_path / "run"
    said = launch(run, SCRIPT, "8", "--do", what)
    assert "rank 0 done" in said
    hangs = events(run, "hang_found")
    assert len(hangs) == 1, said
    hang = hangs[0]
    assert hang["culprit"] == 1
    assert evidence in hang["evidence"]
    assert "1 peer has been waiting" in hang["evidence"]
    if what == "sleep":  # it is named long before it is ended
        (suspected,) = events(run, "hang_suspected")
        assert (suspected["culprit"], suspected["pid"]) == (1, hang["pid"])
        assert suspected["awaited_s"] < hang["silent_s"]
        assert suspected["evidence"].startswith("does nothing for ")
        assert "outlast: rank 1 keeps 1 peer waiting at step " in said
    goodput = build_report(run).goodput
    assert goodput.hang_s > 1
    assert goodput.restart_s > 0
    assert sum(goodput.parts_s().values()) == pytest.approx(goodput.wall_s)
    (told,) = events(run, "goodput")
    assert told["seconds"] == pytest.approx(goodput.parts_s())
    kept = {one["of_rank"]: one for one in events(run, "collectives_kept")}
    (entered_t, completed_t), counted = kept[0]["newest"][-1][5:7], kept[0]["entered"]
    assert completed_t is None
    assert counted > 0
    assert hang.t - 60 < entered_t < hang.t
    # the trace of what really happened: its arrow leads from the rank that waited to the one that hung
    assert write_trace(run, run / "trace.json").arrows == 1
    trace = check_trace((run / "trace.json").read_text())
    names = {one["name"] for one in trace if one["ph"] == "X"}
    assert {"hung", "waited for", f"waits in {kept[0]['newest'][-1][1]} #{kept[0]['newest'][-1][8]}"} <= names
    assert {one["name"] for one in trace if one["ph"] == "s"} == {"waits for rank 1"}


@pytest.mark.soak
@pytest.mark.parametrize("how", ["fsdp2", "zero3"])
def test_however_the_model_is_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "zero3":
        pytest.importorskip("deepspeed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = tmp_path / "run"
    said = launch(run, SCRIPT, "24", "--wrap", how, "--slow", "1", "--slow-s", "0.4", "--do", "stop", "--at", "12")
    assert "rank 0 done" in said
    hangs = events(run, "hang_found")
    assert len(hangs) == 1, said
    hang = hangs[0]
    assert hang["culprit"] == 1
    assert "1 peer has been waiting" in hang["evidence"]
    report = build_report(run)
    assert [row.rank for row in report.stragglers if row.straggler] == [1]


def test_a_rank_that_computes_alone_is_left_alone(tmp_path: Path) -> None:
    """It evaluates, or writes a checkpoint, while its peer waits ten times as long as is allowed for doing nothing."""
    run = tmp_path / "run"
    said = launch(run, SCRIPT, "8", "--do", "compute")
    assert "rank 0 done" in said
    assert "no progress for" in said, "a long wait is told"
    assert not events(run, "hang_found")
    assert not events(run, "workers_failed")


def test_an_error_is_told_with_the_scripts_own_traceback(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = launch(run, "--max-restarts", "0", SCRIPT, "8", "--do", "raise", check=1)
    assert "rank 1" in said
    assert "ValueError: a batch that cannot be read" in said
    assert "runner.py" not in said
    ended = [one for one in events(run, "run_ended") if one.rank == 1]
    assert [(one["ok"], one["reason"]) for one in ended] == [(False, "ValueError: a batch that cannot be read")]


def test_a_second_job_in_the_directory_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first: Job = start_outlast(
        "launch", "--nproc_per_node", "2", "--run-dir", run, SCRIPT, "400", log=tmp_path / "first.log"
    )
    STARTED.append(first)
    wait_for(lambda: run.exists() and events(run, "program_step"))
    said = launch(run, SCRIPT, "4", check=1)
    assert "is being trained on this node" in said or "is in use" in said or "held by" in said
    assert not events(run, "workers_failed")
    assert not events(run, "run_ended"), "the first job goes on"
    assert [path.name for path in sorted((run / "attempts").iterdir())] == ["0001", "latest"]


PYTHON = """
import multiprocessing, os, sys

def square(x):
    return x * x

if __name__ == "__main__":
    print([os.path.basename(sys.argv[0]), *sys.argv[1:]], os.path.basename(__file__), __name__)
    print(sys.path[0], os.getcwd())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [2, 3]), flush=True)
    sys.exit(0)
"""


@pytest.mark.parametrize("form", ["script", "module", "folder"])
def test_a_program_sees_what_python_would_show_it(tmp_path: Path, form: str) -> None:
    """Its arguments may look like the launcher's."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "job.py").write_text(PYTHON)
    # Python itself starts no pool of such a program.
    (tmp_path / "package" / "__main__.py").write_text(re.sub(r"    with .*\n.*\n", "", PYTHON))
    target = {"script": ["package/job.py"], "module": ["-m", "package.job"], "folder": ["package"]}[form]
    words = ["--nnodes", "7", "--launch.watch", "x", "-m", "--", "--help"]
    env = clean_env()
    plain = subprocess.run(
        [sys.executable, *target, *words], cwd=tmp_path, env=env, text=True, capture_output=True, check=True
    )
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        launched = outlast("launch", "--standalone", *target, *words, env=env)
    finally:
        os.chdir(before)
    assert plain.stdout in launched.stdout
    assert (tmp_path / "runs" / {"script": "job", "module": "package.job", "folder": "package"}[form]).is_dir()


def test_a_program_that_is_not_python(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = launch(run, "--no-python", "sh", "-c", 'sleep 4; echo "rank $RANK of $WORLD_SIZE"')
    assert "rank 0 of 2" in said
    assert "not watched" in said
    assert not events(run, "hang_found")


def test_how_often_it_is_looked_at_can_be_set(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text("import os, sys\nprint('looks', os.environ['OUTLAST_LOOK_EVERY_S'], 'outlast' in sys.modules)\n")
    said = launch(tmp_path / "seldom", "--launch.look-every-s", "0.1", script)
    assert "looks 0.1 True" in said
    assert "is not watched" not in said
    said = launch(tmp_path / "never", "--launch.look-every-s", "0", script)
    assert "looks 0 False" in said.replace("0.0", "0")
    assert "plain.py is not watched, because launch.look_every_s is 0" in said
    assert [one["ranks"] for one in events(tmp_path / "never", "workers_started")]
    assert not events(tmp_path / "never", "run_started")
