"""Stock torchrun with ``--rdzv-backend outlast``: real launchers, one of which is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from outlast.checkpoint.storage.local import LocalStore
from outlast.free_port import free_port
from outlast.launch.control.board import SealedBoard, StoreBoard
from outlast.launch.control.journal import Journal
from outlast.launch.control.records import Done, Formed, Lead, Record
from outlast.launch.trusted_rendezvous import run_secret
from tests.helpers import clean_env

PROGRAM = """
import sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
ones = torch.ones(1)
for step in range(int(sys.argv[1])):
    ones.fill_(1)
    dist.all_reduce(ones)
    time.sleep(0.05)
    if dist.get_rank() == 0 and step == 10:
        open(sys.argv[2], "a").write(f"{dist.get_world_size()}\\n")
dist.destroy_process_group()
"""


class Cluster:
    """Launchers on this host, each as a node of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder / "place"
        self.endpoint, self.env = str(self.place), dict[str, str]()
        self.place.mkdir()
        (folder / "program.py").write_text(PROGRAM)
        self.jobs: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, nodes: str, steps: int) -> None:
        command = [str(Path(sys.executable).parent / "torchrun"), "--nnodes", nodes, "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "outlast", "--rdzv-endpoint", self.endpoint, "--rdzv-id", "job"]
        command += ["--local-addr", "127.0.0.1", "--monitor-interval", "0.1", "--max-restarts", "3"]
        command += [str(self.folder / "program.py"), str(steps), str(self.folder / "marks")]
        with (self.folder / f"{name}.log").open("ab") as log:
            env = clean_env(OUTLAST_NODE_ID=name, **self.env)
            job = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        self.jobs[name] = job

    def kill(self, name: str) -> None:
        """The launcher and its ranks, as when a machine is lost."""
        process = psutil.Process(self.jobs[name].pid)
        for one in [process, *process.children(recursive=True)]:
            os.kill(one.pid, signal.SIGKILL)

    def records(self) -> list[Record]:
        board = SealedBoard(StoreBoard(LocalStore(str(self.place)), "control/job"), run_secret(self.place), "job")
        return [record for _, record in board.read_on(Journal())]

    def marks(self) -> int:
        path = self.folder / "marks"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def await_marks(self, count: int, limit_s: float = 120.0) -> None:
        deadline_s = time.monotonic() + limit_s
        while self.marks() < count:
            assert time.monotonic() < deadline_s, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    for name, job in cluster.jobs.items():
        if job.poll() is None:
            cluster.kill(name)
        job.wait(30)


@pytest.mark.soak
def test_the_launcher_that_leads_is_lost_with_its_node(cluster: Cluster) -> None:
    """A spare takes its place, another node leads on, and all that are left end well."""
    for name in ("a", "b", "c"):
        cluster.start(name, "2", 400)
    cluster.await_marks(1)
    first = [one for one in cluster.records() if isinstance(one, Lead)]
    lost = first[0].leader.name
    formed = next(one for one in cluster.records() if isinstance(one, Formed))
    cluster.kill(lost)
    statuses = {name: job.wait(180) for name, job in cluster.jobs.items()}
    assert {name: status for name, status in statuses.items() if name != lost} == dict.fromkeys(
        set(statuses) - {lost}, 0
    ), cluster.logs()
    records = cluster.records()
    leads = [one.leader.name for one in records if isinstance(one, Lead)]
    assert len(leads) == 2
    assert leads[1] != lost
    generations = [[member.name for member in one.members] for one in records if isinstance(one, Formed)]
    assert lost not in generations[-1]
    if lost in [member.name for member in formed.members]:
        assert len(generations) == 2
        assert cluster.marks() == 2
    assert isinstance(records[-1], Done)
    assert records[-1].succeeded
    assert "torch/distributed/run.py" not in (cluster.folder / f"{leads[1]}.log").read_text(), "torchrun ended well"


def test_two_nodes(cluster: Cluster) -> None:
    """As the docs have it."""
    for name in ("a", "b"):
        cluster.start(name, "1:2", 20)
    assert [job.wait(120) for job in cluster.jobs.values()] == [0, 0], cluster.logs()
    kinds = [one.kind for one in cluster.records()]
    assert kinds == ["lead", "formed", "done"], cluster.logs()
    assert (cluster.folder / "marks").read_text() == "2\n"


def test_two_nodes_that_meet_at_a_port(cluster: Cluster) -> None:
    """Both are on the host of the endpoint, and only one of them can lead."""
    cluster.endpoint, cluster.env = f"127.0.0.1:{free_port()}", {"OUTLAST_LAUNCH_SECRET": "a secret of the test"}
    for name in ("a", "b"):
        cluster.start(name, "2", 20)
    assert [job.wait(120) for job in cluster.jobs.values()] == [0, 0], cluster.logs()
    assert (cluster.folder / "marks").read_text() == "2\n"
    assert not any(cluster.place.iterdir())
