"""What the flags mean, before anything is started."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from outlast.errors import ConfigError, LaunchError, OutOfRange
from outlast.launch import LaunchConfig, LaunchFlags, LaunchSpec, dry_run, launch
from outlast.launch.failures import RankFailure, describe_exit, last_output
from outlast.launch.rendezvous import resolve

SRUN = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "localhost,other",
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_restarts", -1),
        ("monitor_interval_s", 0.0),
        ("hang_floor_s", 0.0),
        ("hang_factor", 0.5),
        ("startup_limit_s", -1.0),
        ("patience", 0.0),
        ("stop_grace_s", -1.0),
        ("exit_barrier_s", -1.0),
    ],
)
def test_settings_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(OutOfRange, match=f"launch.{key} = {value!r}"):
        LaunchConfig(**{key: value})


def test_the_defaults_keep_the_promise() -> None:
    """A hang is found within max(10 s, 5 x median step), a look at the ranks more than once a second included."""
    config = LaunchConfig()
    for median_s in (0.01, 0.5, 1.0, 2.0, 2.5, 10.0, 100.0):
        limit_s = max(config.hang_floor_s, config.hang_factor * median_s)
        assert limit_s + 2 * config.monitor_interval_s <= max(10.0, 5 * median_s)


@pytest.mark.parametrize("nnodes", ["0", "2:1", "x", "", "1:2:3", "-1"])
def test_numbers_of_nodes_that_are_none(nnodes: str) -> None:
    with pytest.raises(OutOfRange, match="--nnodes"):
        LaunchFlags(nnodes=nnodes)


def test_one_node_needs_nothing() -> None:
    rendezvous = resolve(LaunchFlags(), {})
    assert rendezvous.host_and_port() == ("127.0.0.1", 0)
    assert (rendezvous.min_nodes, rendezvous.max_nodes, rendezvous.local_addr) == (1, 1, "127.0.0.1")
    assert rendezvous.run_id != resolve(LaunchFlags(), {}).run_id


def test_several_nodes_need_an_endpoint() -> None:
    with pytest.raises(ConfigError, match=r"(?s)--nnodes 2:4 .*--rdzv-endpoint HOST:PORT"):
        resolve(LaunchFlags(nnodes="2:4"), {})
    rendezvous = resolve(LaunchFlags(nnodes="2:4", rdzv_endpoint="h:1", rdzv_conf="is_host=true, timeout=5"), {})
    assert rendezvous.host_and_port() == ("h", 1)
    assert rendezvous.conf == {"is_host": "true", "join_timeout": "5"}
    assert resolve(LaunchFlags(nnodes="2", master_addr="h", master_port=7), {}).endpoint == "h:7"


def test_srun_gives_the_endpoint() -> None:
    rendezvous = resolve(LaunchFlags(nnodes="2"), SRUN)
    assert rendezvous.host_and_port() == ("localhost", 61440 + 9 * 16)
    assert rendezvous.conf == {"is_host": "False"}
    assert rendezvous.run_id == "slurm-9-0"
    assert resolve(LaunchFlags(nnodes="2", rdzv_endpoint="h:1"), SRUN).endpoint == "h:1"


@pytest.mark.parametrize(
    "flags",
    [
        {"rdzv_endpoint": "h:port"},
        {"rdzv_endpoint": "h:70000"},
        {"rdzv_endpoint": "h:1", "rdzv_conf": "timeout"},
        {"standalone": True, "nnodes": "2"},
    ],
)
def test_flags_that_are_wrong(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        resolve(LaunchFlags(**flags), {})


def test_flags_that_stand_for_settings(tmp_path: Path) -> None:
    flags = LaunchFlags(max_restarts=7, monitor_interval=0.25)
    config = LaunchSpec(command=("true",), run_dir=tmp_path, flags=flags).effective()
    assert (config.max_restarts, config.monitor_interval_s) == (7, 0.25)
    with pytest.raises(OutOfRange):
        LaunchSpec(command=("true",), run_dir=tmp_path, flags=LaunchFlags(max_restarts=-1)).effective()


def test_dry_run_runs_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = LaunchFlags(nproc_per_node="3", nnodes="1:4", rdzv_endpoint="head:29500", max_restarts=5)
    text = dry_run(LaunchSpec(command=(sys.executable, "a b.py"), run_dir=run, flags=flags))
    assert f"{sys.executable} 'a b.py'" in text
    assert "3 on this node; nodes: 1 to 4" in text
    assert "c10d at head:29500 (--rdzv-endpoint)" in text
    assert "up to 5 after a failure or a hang (no progress for 8 s and 4 median steps" in text
    assert str(run) in text
    assert not run.exists()


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_numbers_of_ranks_that_are_none(tmp_path: Path, count: str) -> None:
    with pytest.raises(OutOfRange, match="--nproc-per-node"):
        dry_run(LaunchSpec(command=("true",), run_dir=tmp_path, flags=LaunchFlags(nproc_per_node=count)))


def test_a_static_rendezvous_is_held_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="static"):
        launch(LaunchSpec(command=("true",), run_dir=tmp_path, flags=LaunchFlags(rdzv_backend="static")))


def test_only_the_main_thread_launches(tmp_path: Path) -> None:
    caught: list[LaunchError] = []

    def attempt() -> None:
        try:
            launch(LaunchSpec(command=("true",), run_dir=tmp_path))
        except LaunchError as error:
            caught.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_exits_in_words() -> None:
    assert describe_exit(3) == "exited with status 3"
    assert describe_exit(-11) == "killed by SIGSEGV"
    assert describe_exit(-64) in ("killed by SIGRTMAX", "killed by signal 64")


def test_the_likely_cause_comes_first() -> None:
    lost = RankFailure(rank=0, pid=1, status=1, message="RuntimeError: Connection closed by peer")
    mute = RankFailure(rank=1, pid=2, status=1)
    loud = RankFailure(rank=2, pid=3, status=1, message="ValueError: x")
    shot = RankFailure(rank=3, pid=4, status=-9)
    hung = RankFailure(rank=4, pid=5, status=-9, hang="stopped")
    assert sorted([lost, mute, loud, shot, hung], key=RankFailure.sort_key) == [hung, shot, loud, mute, lost]


def test_last_output(tmp_path: Path) -> None:
    log, stale, error_file = tmp_path / "log", tmp_path / "stale", tmp_path / "error.json"
    log.write_text("one\n\ntwo\nthree\nfour\n")
    stale.write_text("long ago\n")
    since = log.stat().st_mtime - 1
    assert last_output(None, [tmp_path / "none", log, stale], since) == ("two\nthree\nfour", log)
    assert last_output(None, [stale], since + 1e6) == ("", None)
    error_file.write_text('{"message": {"message": "ValueError: x", "extraInfo": {}}}')
    assert last_output(error_file, [log], since) == ("ValueError: x", log)
    error_file.write_text('{"message": "SystemExit"}')
    assert last_output(error_file, [], since) == ("SystemExit", error_file)
    error_file.write_text("{torn")
    assert re.search("four", last_output(error_file, [log], since)[0])
