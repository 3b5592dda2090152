"""Standby processes that become ranks at a restart: as a new interpreter would be, and leaving nothing behind."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from outlast.launch.orphans import MARK
from outlast.launch.standby.memory import free_bytes, taken_bytes
from outlast.launch.standby.process import Standby, Start
from tests.forked import Job
from tests.helpers import clean_env, events, outlast, start_outlast, wait_for
from tests.launch.jobs import STARTED

HERE = Path(__file__).parent
SOON = ("--nproc-per-node", "2", "--launch.standby-after-s", "0.2", "--launch.backoff-s", "0")


def launch(run: Path, *words: str | Path) -> Job:
    job = start_outlast("launch", "--run-dir", run, *SOON, *words, log=run.with_suffix(".log"))
    STARTED.append(job)
    return job


def waiting(launcher: Job) -> list[int]:
    """The standbys that have imported all."""
    found = []
    for child in psutil.Process(launcher.pid).children():
        try:
            if Path(f"/proc/{child.pid}/comm").read_text() == "outlast-standby\n":
                found.append(child.pid)
        except OSError:  # it has ended
            continue
    return sorted(found)


def two_wait(launcher: Job) -> list[int]:
    return found if len(found := waiting(launcher)) == 2 else []


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def told(folder: Path, generation: int) -> list[dict[str, Any]]:
    """What both ranks of a start have written."""
    paths = [folder / f"{generation}_{rank}.json" for rank in (0, 1)]
    return [json.loads(path.read_text()) for path in paths] if all(path.exists() for path in paths) else []


def test_a_standby_becomes_the_rank_that_a_new_interpreter_would_be(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    job = launch(run, "--standby", HERE / "standby_rank.py", tmp_path, "--an", "argument")
    fresh = wait_for(lambda: told(tmp_path, 0))
    first = wait_for(lambda: two_wait(job))
    os.kill(first[0], signal.SIGKILL)
    second = wait_for(lambda: first[0] not in (pids := two_wait(job)) and pids)
    assert first[1] in second, "the other one still waits"
    assert f"(pid {first[0]}) ended with status -9 while it waited; another one is started" in log.read_text()
    os.kill(fresh[1]["pid"], signal.SIGKILL)
    standby = wait_for(lambda: told(tmp_path, 1))
    assert sorted(one["pid"] for one in standby) == second
    for before, after in zip(fresh, standby, strict=True):
        for key, value in before["found"].items():
            assert after["found"][key] == value, key
    started = events(run, "workers_started")
    assert [sorted(one["pids"]) for one in started] == [sorted(one["pid"] for one in fresh), second]
    assert "outlast: all 2 ranks of this node go on in standby processes" in log.read_text()
    assert "rank 0 of start 1 speaks" in log.read_text()
    assert [path.read_text() for path in run.glob("launcher/*/restart_1/rank_00001.out")] == [
        "rank 1 of start 1 speaks\n"
    ]
    third = wait_for(lambda: two_wait(job))
    job.kill()  # the launcher, by SIGKILL
    job.wait(60)
    wait_for(lambda: not any(runs(pid) for pid in (*second, *third)))


@pytest.mark.slow
def test_results_are_those_of_a_new_interpreter_bit_for_bit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = launch(run, "--standby", HERE / "standby_training.py", tmp_path)
    wait_for(lambda: two_wait(job), 240)
    (tmp_path / "kill").touch()
    assert job.wait(120) == 0
    assert "all 2 ranks of this node go on in standby processes" in run.with_suffix(".log").read_text()
    for rank in (0, 1):
        fresh, standby = ((tmp_path / f"{generation}_{rank}").read_text() for generation in (0, 1))
        cores = min(2, os.cpu_count() or 1)
        assert fresh.startswith(f"{cores} "), "the program set OMP_NUM_THREADS before it imported torch"
        assert standby == fresh


def test_a_standby_that_cannot_import_is_told_once_and_the_job_goes_on_without(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "run.toml").write_text('[launch]\nstandby = "auto"\nstandby_modules = ["nothing_such", "leaving"]\n')
    script = tmp_path / "script.py"
    script.write_text((HERE / "standby_rank.py").read_text())
    run, log = tmp_path / "run", tmp_path / "run.log"
    job = launch(run, "--config", tmp_path / "run.toml", script, tmp_path)
    fresh = wait_for(lambda: told(tmp_path, 0))
    wait_for(lambda: "no more standbys are started, and restarts take new interpreters" in log.read_text())
    os.kill(fresh[1]["pid"], signal.SIGKILL)
    wait_for(lambda: told(tmp_path, 1))
    (tmp_path / "end").touch()
    assert job.wait(60) == 0
    said = log.read_text()
    assert said.count("ended with status 3 while it imported") == 1
    assert "go on in standby" not in said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--standby", "--no-python", "true"), "only a Python program"),
        (("--standby", "--launch.look-every-s", "0", HERE / "standby_rank.py"), "only a Python program"),
        (("--standby", "--max-restarts", "0", HERE / "standby_rank.py"), "nothing is restarted"),
    ],
)
def test_a_standby_that_is_asked_for_and_not_possible_is_an_error(
    tmp_path: Path, words: tuple[str | Path, ...], why: str
) -> None:
    assert why in outlast("launch", "--run-dir", tmp_path / "run", *words, check=2).stderr


def test_it_refuses_a_place_that_it_has_not_prepared_for(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.exit(7)\n")
    package = tmp_path / "reading_package.py"
    package.write_text("import os\nRANK, ALL = os.environ['RANK'], dict(os.environ)\n")
    environ = clean_env(PYTHONPATH=f"{HERE.parent.parent}:{tmp_path}", RANK="1", MASTER_PORT="1", **{MARK: "mark"})
    start = Start((sys.executable, "-m", "outlast.launch.runner", str(script)), environ)
    standby = Standby(start, {"modules": ["reading_package"], "environ": {}}, tmp_path / "log")
    try:
        assert standby.refuses(start) == "its standby had not imported everything yet"
        wait_for(lambda: standby.look() and standby.report is not None)
        assert (taken_bytes(standby.process.pid) or 0) > 1 << 20
        assert (free_bytes() or 0) > 1 << 20
        assert standby.refuses(start) == ""
        moved = {**environ, "MASTER_PORT": "2", "TORCHELASTIC_RESTART_COUNT": "1", "OUTLAST_GENERATION": "1"}
        assert standby.refuses(Start(start.arguments, moved)) == ""
        assert "RANK has changed, and a package" in standby.refuses(Start(start.arguments, {**moved, "RANK": "0"}))
        assert standby.refuses(Start(start.arguments, {**moved, "LANG": "xx"})).startswith("LANG has changed since")
        assert standby.refuses(Start((*start.arguments, "--more"), moved)) == "its command has changed"
        os.kill(standby.process.pid, signal.SIGSTOP)
        assert not standby.become(start, 1, 2), "one that does not answer is given up"
    finally:
        standby.end()
    assert standby.process.returncode == -signal.SIGKILL
