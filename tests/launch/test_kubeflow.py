"""torchrun's environment variables, as Kubeflow sets them in each pod."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cluster import Cluster
from outlast.errors import ConfigError
from outlast.launch.flag_sources import arguments_from_environment
from tests.helpers import clean_env, events, outlast

SCRIPT = Path(__file__).with_name("watched_program.py")


@pytest.mark.root
def test_two_pods_are_one_job(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Cluster(2, prefix="olk", subnet="10.94.0") as cluster:
        pods = []
        for rank, host in enumerate(cluster.hosts):
            env = clean_env(
                PET_NNODES="2",
                PET_NPROC_PER_NODE="1",
                PET_NODE_RANK=str(rank),
                PET_MASTER_ADDR=cluster.hosts[0].address,
                PET_MASTER_PORT="29400",
                GLOO_SOCKET_IFNAME="eth0",
            )
            words = [sys.executable, "-m", "outlast", "launch", "--run-dir", str(run), str(SCRIPT), "6"]
            with (tmp_path / f"pod_{rank}.log").open("w") as log:
                pods.append(host.popen(words, env=env, stdout=log, stderr=subprocess.STDOUT))
        statuses = [pod.wait(timeout=200) for pod in pods]
    said = "".join(path.read_text() for path in sorted(tmp_path.glob("pod_*.log")))
    assert statuses == [0, 0], said
    started = [(one.rank, one["world_size"]) for one in events(run, "run_started")]
    assert sorted(started) == [(0, 2), (1, 2)]


def test_the_command_line_comes_first() -> None:
    environ = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_RDZV_ID": "job"}
    assert arguments_from_environment(["--nproc_per_node", "4", "--nnodes=3"], environ) == ["--rdzv-id", "job"]
    assert arguments_from_environment([], {"PET_STANDALONE": "1", "PET_MAX_RESTARTS": "2"}) == [
        "--standalone",
        "--max-restarts",
        "2",
    ]
    assert arguments_from_environment([], {"HOME": "/", "PET_STANDALONE": "0"}) == []


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"PET_RDZV_ENDPOINT": "a:1", "PET_MASTER_ADDR": "b"}, ("PET_RDZV_ENDPOINT=a:1", "PET_MASTER_ADDR=b")),
        ({"PET_STANDALONE": "1", "PET_RDZV_ENDPOINT": "a:1"}, ("PET_STANDALONE=1", "PET_RDZV_ENDPOINT=a:1")),
        ({"PET_STANDALONE": "1", "PET_NNODES": "2"}, ("PET_STANDALONE=1", "PET_NNODES=2")),
    ],
)
def test_what_contradicts_is_named(environ: dict[str, str], names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        arguments_from_environment([], environ)
    assert all(name in str(error.value) for name in names)


def test_a_node_that_is_not_among_the_nodes(tmp_path: Path) -> None:
    env = clean_env(PET_NNODES="2", PET_NODE_RANK="2", PET_MASTER_ADDR="127.0.0.1")
    done = outlast("launch", "--run-dir", tmp_path / "run", SCRIPT, "1", env=env, check=2)
    assert "--node-rank" in done.stderr
    assert "--nnodes 2" in done.stderr
    assert "PET_NODE_RANK=2" in done.stderr
