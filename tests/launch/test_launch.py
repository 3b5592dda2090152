"""The launcher with real ranks: failures, hangs, signals, ports."""

from __future__ import annotations

import gc
import io
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from outlast.diagnostics import build_report, render_terminal
from outlast.diagnostics.live import shm_directory
from outlast.errors import LaunchError, PortInUse, RanksFailed
from outlast.free_port import free_port
from outlast.launch import LaunchConfig, LaunchFlags, LaunchSpec, launch
from tests.helpers import events, wait_for
from tests.launch.jobs import QUICK, RANK, finish, ranks_of, start, steps


def here(run: Path, *command: str, **config: Any) -> None:
    """``launch`` in this process, two ranks."""
    try:
        launch(
            LaunchSpec(
                command=command,
                run_dir=run,
                config=LaunchConfig(**{**QUICK, **config}),
                flags=LaunchFlags(nproc_per_node="2"),
            )
        )
    finally:
        gc.collect()  # while the filter of IN_PROCESS is in force


IN_PROCESS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
"""torchelastic leaves the files of its ranks' output to the garbage collector."""


def test_a_killed_rank_is_replaced_and_the_rest_with_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = finish(start(run, RANK, str(run), "8", "--rank", "1", "--at", "4", "--do", "kill", "--once"), run)
    assert "rank 0 of 2 done in generation 1" in said
    assert [s for s in steps(run) if s[0] == 0 and s[1] == 1][-1] == (0, 1, 4)
    assert sorted(s for s in steps(run) if s[0] == 1) == [(1, rank, step) for rank in (0, 1) for step in range(1, 9)]
    started, failed, again = (one for one in events(run) if one.kind.startswith("workers_"))
    assert [one.kind for one in (started, failed, again)] == ["workers_started", "workers_failed", "workers_started"]
    assert not [one for one in events(run) if one.kind in ("hang_found", "verdict", "notice")]
    assert (started["ranks"], started["restarts_left"], started.generation) == ([0, 1], 3, 0)
    assert (again["ranks"], again["restarts_left"], again.generation) == ([0, 1], 2, 1)
    assert failed["restarting"]
    assert (1, "killed by SIGKILL") in zip(failed["ranks"], failed["reasons"], strict=True)
    (other_ranks_output,) = run.glob("launcher/*/restart_1/rank_00001.out")
    assert "rank 1 of 2 done in generation 1" in other_ranks_output.read_text()
    assert not any(shm_directory(run).iterdir())


def test_a_rank_that_is_killed_while_it_writes_its_error_file(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = finish(start(run, RANK, str(run), "8", "--rank", "1", "--at", "4", "--do", "torn", "--once"), run)
    assert "rank 0 of 2 done in generation 1" in said
    (failed,) = [one for one in events(run) if one.kind == "workers_failed"]
    assert (1, "killed by SIGKILL") in zip(failed["ranks"], failed["reasons"], strict=True)


def test_ranks_that_fail_again_and_again_do_not_meet_the_dead_ones(tmp_path: Path) -> None:
    """Each start has a fresh store: every one gets as far as the first did."""
    run = tmp_path / "run"
    job = start(run, RANK, str(run), "9", "--rank", "1", "--at", "2", "--do", "raise", flags={"max_restarts": 1})
    said = finish(job, run, status=1)
    assert [(generation, 1, 2) in steps(run) for generation in range(2)] == [True] * 2
    assert "RanksFailed: ranks failed after 1 of 1 restarts" in said
    assert "exited with status 1: [rank1]: ValueError: the rank was told to raise this" in said
    assert "rank_00001.err" in said
    assert [record["restarting"] for record in events(run, "workers_failed")] == [True, False]


@pytest.mark.parametrize("how", ["stop", pytest.param("spin", marks=pytest.mark.slow)])
def test_a_hung_rank_is_found_and_replaced(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    said = finish(start(run, RANK, str(run), "8", "--rank", "1", "--at", "6", "--do", how, "--once"), run)
    assert "rank 0 of 2 done in generation 1" in said
    (hang,) = events(run, "hang_found")
    assert (hang["culprit"], hang["step"], hang["limit_s"]) == (1, 6, 2.0)
    assert hang["pid"] == events(run, "workers_started")[0]["pids"][1]
    assert hang["silent_s"] > 2.0
    assert "1 peer has been waiting" in hang["evidence"]
    (failed,) = events(run, "workers_failed")
    assert failed["ranks"][0] == 1
    assert failed["reasons"][0].startswith("hung, killed by the launcher: ")
    (stderr,) = run.glob("launcher/*/restart_0/rank_00001.err")
    if how == "stop":
        assert "stopped" in hang["evidence"]
    else:
        assert "running, silent for" in hang["evidence"]
        assert "in misbehave" in stderr.read_text(), "the stacks of a hung rank are dumped before it is killed"


def test_a_rank_that_leaves_out_a_collective(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = finish(start(run, RANK, str(run), "8", "--rank", "1", "--at", "6", "--do", "skip", "--once"), run)
    assert "rank 0 of 2 done in generation 1" in said
    (hang,) = events(run, "hang_found")
    assert (hang["culprit"], hang["step"]) == (1, 6)
    assert hang["evidence"].startswith(
        "desynchronised: ranks 0 and 1 are in different collectives; rank 1 left the order first: its collective #5 "
        "was recv 'what comes after the all-reduce' of 16 bytes in step 6, that of rank 0 all_reduce 'ones'"
    )
    assert "another node" not in said


def test_launcher_and_ranks_are_stopped_and_continued(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, RANK, str(run), "60", "--step-s", "0.1")
    wait_for(lambda: (run / "steps").exists() and len(steps(run)) > 12)
    pids = [*events(run, "workers_started")[0]["pids"], job.pid]
    for pid in (job.pid, *pids[:2]):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5.0)  # more than twice the limit
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    finish(job, run)
    assert events(run, "hang_found") == []
    assert events(run, "workers_failed") == []


def test_all_ranks_wait_for_the_same_storage(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = finish(start(run, RANK, str(run), "8", "--at", "6", "--do", "wait:5", "--all"), run)
    assert events(run, "hang_found") == []
    assert events(run, "workers_failed") == []
    assert "no progress for " in said
    assert "the ranks make progress again" in said


@IN_PROCESS
@pytest.mark.slow
def test_a_rank_that_never_begins(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RanksFailed, match=r"rank 0 on .* \(pid \d+\): hung, killed by the launcher: no heartbeat"):
        here(
            run,
            sys.executable,
            "-c",
            "import time; time.sleep(99)",
            startup_limit_s=1.0,
            together_limit_s=1.0,
            max_restarts=0,
        )
    assert {record["culprit"] for record in events(run, "hang_found")} == {0, 1}


@IN_PROCESS
def test_a_command_without_heartbeats_is_left_alone_when_told_so(tmp_path: Path) -> None:
    here(tmp_path / "run", sys.executable, "-c", "import time; time.sleep(3)", startup_limit_s=1.0, watch=False)


@IN_PROCESS
def test_a_rank_that_knows_better_is_not_started_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = "import os, sys; print('no such thing', file=sys.stderr); sys.exit(93 if os.environ['RANK'] == '1' else 0)"
    with pytest.raises(
        RanksFailed, match=r"(?s)a restart would not fix it.*rank 1 .* exited with status 93: no such thing"
    ):
        here(run, sys.executable, "-c", code)
    (failed,) = events(run, "workers_failed")
    assert (failed["ranks"], failed["restarting"]) == ([1], False)


@IN_PROCESS
@pytest.mark.parametrize(("how", "words"), [("os.abort()", "killed by SIGABRT"), ("os._exit(7)", "status 7")])
def test_how_a_rank_ended_is_said_in_words(tmp_path: Path, how: str, words: str) -> None:
    with pytest.raises(RanksFailed, match=words):
        here(tmp_path / "run", sys.executable, "-c", f"import os; {how}", max_restarts=0)


@IN_PROCESS
def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match="no-such-program cannot be run: No such file"):
        here(tmp_path / "run", "no-such-program", max_restarts=0)


@IN_PROCESS
def test_arguments_reach_the_ranks_as_they_are(tmp_path: Path) -> None:
    code = "import sys; assert sys.argv[1:] == ['$HOME', '$$', '${local_rank}', 'a b', ''], sys.argv"
    here(tmp_path / "run", sys.executable, "-c", code, "$HOME", "$$", "${local_rank}", "a b", "", max_restarts=0)


@IN_PROCESS
def test_the_environment_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = (dict(os.environ), signal.getsignal(signal.SIGTERM))
    code = "import os; e = os.environ; assert e['OMP_NUM_THREADS'] == '1'; assert e['WORLD_SIZE'] == '2'"
    here(tmp_path / "run", sys.executable, "-c", code, max_restarts=0)
    added = {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
    after = {key: value for key, value in os.environ.items() if key not in added}
    assert (after, signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_told_to_end_ends_its_ranks(tmp_path: Path, signum: signal.Signals) -> None:
    run = tmp_path / "run"
    job = start(run, "-c", "import time; time.sleep(99)")
    pids = wait_for(lambda: ranks_of(run))
    os.kill(pids[1], signal.SIGSTOP)  # a stopped rank does not hold it up either
    job.send_signal(signum)
    finish(job, run, status=128 + signum)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_loop_of_ones_own_obeys_a_notice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, RANK, str(run), "100000", "--notice")
    wait_for(lambda: (run / "steps").exists() and len(steps(run)) > 6)
    job.send_signal(signal.SIGUSR1)
    said = finish(job, run, status=75)
    assert "rank 0 was told to end: SIGUSR1" in said
    (last,) = {max(step for _, rank, step in steps(run) if rank == one) for one in (0, 1)}
    assert last < 100000
    assert not any(shm_directory(run).iterdir())


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, "-c", "import time; time.sleep(99)")
    pids = wait_for(lambda: ranks_of(run))
    # they have become the command; between the two the kernel shows an empty command line
    wait_for(lambda: all(psutil.Process(pid).cmdline()[1:2] == ["-c"] for pid in pids))
    job.kill()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_a_port_that_something_else_has_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)  # and never says a word
        port = taken.getsockname()[1]
        spec = LaunchSpec(
            command=("true",),
            run_dir=tmp_path / "run",
            flags=LaunchFlags(rdzv_endpoint=f"127.0.0.1:{port}"),
        )
        with pytest.raises(PortInUse, match=rf"port {port} of 127.0.0.1 is in use by .*pid {os.getpid()}") as caught:
            launch(spec)
        assert "--rdzv-endpoint 127.0.0.1:PORT" in caught.value.fix


@pytest.mark.slow
def test_two_launchers_meet_and_restart_together(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = {
        "nproc_per_node": "1",
        "nnodes": "2",
        "rdzv_endpoint": f"127.0.0.1:{free_port()}",
        "local_addr": "127.0.0.1",
    }
    words = (RANK, str(run), "6", "--rank", "1", "--at", "3", "--do", "kill", "--once")
    run.mkdir()
    jobs = [start(run, *words, flags=flags) for _ in range(2)]
    said = [finish(job, run) for job in jobs][-1]
    assert "rank 0 of 2 done in generation 1" in said
    assert sorted(s for s in steps(run) if s[0] == 1)[-1] == (1, 1, 6)


@IN_PROCESS
def test_a_static_rendezvous(tmp_path: Path) -> None:
    flags = LaunchFlags(nproc_per_node="2", rdzv_backend="static", master_port=free_port(), max_restarts=0)
    code = "import os; assert os.environ['WORLD_SIZE'] == '2'"
    launch(LaunchSpec(command=(sys.executable, "-c", code), run_dir=tmp_path / "run", flags=flags))
    gc.collect()


def test_several_nodes_that_do_not_come(tmp_path: Path) -> None:
    spec = LaunchSpec(
        command=("true",),
        run_dir=tmp_path / "run",
        flags=LaunchFlags(nnodes="2", rdzv_endpoint=f"127.0.0.1:{free_port()}", rdzv_conf="join_timeout=1"),
    )
    with pytest.raises(LaunchError, match=r"the rendezvous at 127\.0\.0\.1"):
        launch(spec)


def test_starts_that_fail_before_any_event_are_counted_in_the_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(run, "-c", "import a_module_that_is_not_there", max_restarts=3)
    finish(job, run, status=1)
    report = build_report(run)
    assert (report.facts.restarts, report.facts.world_size, report.facts.finished) == (3, 2, False)
    console = Console(width=120, record=True, file=io.StringIO())
    render_terminal(report, console)
    text = console.export_text()
    assert "a_module_that_is_not_there" in text.splitlines()[0] + text.splitlines()[1]
    assert f"2 ranks on {socket.gethostname()}" in text
    shown = text[text.index("Incidents") :]
    assert "not restarted" in shown.split("restarting")[0]  # the newest failure comes first
    assert shown.rindex("failed on") < shown.index("restart 1;")  # and failures before restarts
