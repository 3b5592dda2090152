"""Nothing is unpickled that does not carry the run's MAC, and one node's job listens on loopback alone."""

from __future__ import annotations

import base64
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

from outlast.errors import LaunchError
from outlast.free_port import free_port
from outlast.launch.trusted_rendezvous import SECRET, SECRET_FILE, AuthenticatedBackend, run_secret
from tests.helpers import events, start_outlast, tiny_config, wait_for

RUN = "a-run"


class Payload:
    """What an attacker's pickle does when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def overwrite(store: Any, run_id: str, content: bytes) -> None:
    """What anybody can do who reaches the store's port."""
    store.set(f"torch.rendezvous.{run_id}", base64.b64encode(content).decode())


def pair(first: bytes = b"k" * 32, second: bytes = b"k" * 32) -> tuple[Any, AuthenticatedBackend, AuthenticatedBackend]:
    """A store, and two nodes' backends on it."""
    store = HashStore()
    one, two = (AuthenticatedBackend(C10dRendezvousBackend(store, RUN), key, RUN) for key in (first, second))
    return store, one, two


def test_states_pass_between_nodes_with_the_same_secret() -> None:
    _, one, two = pair()
    assert one.get_state() is None
    assert two.get_state() is None
    written = one.set_state(b"first")
    assert written is not None
    assert written[0] == b"first"
    assert written[2]
    seen = two.get_state()
    assert seen is not None
    assert seen[0] == b"first"
    late = two.set_state(b"from nothing")  # without a token: there is a state already
    assert late is not None
    assert (late[0], late[2]) == (b"first", False)
    again = two.set_state(b"second", seen[1])
    assert again is not None
    assert again[2]
    stale = one.set_state(b"third", written[1])
    assert stale is not None
    assert (stale[0], stale[2]) == (b"second", False)


def test_another_secret_or_another_run_is_refused() -> None:
    _, one, two = pair(second=b"x" * 32)
    one.set_state(b"first")
    with pytest.raises(RendezvousStateError, match="share the run's directory"):
        two.get_state()
    store = HashStore()
    this, other = (AuthenticatedBackend(C10dRendezvousBackend(store, RUN), b"k" * 32, run) for run in (RUN, "other"))
    this.set_state(b"first")
    with pytest.raises(RendezvousStateError):
        other.get_state()


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 40])
def test_a_forged_state_is_replaced_by_the_newest_that_was_seen(cut: int) -> None:
    store, one, two = pair()
    one.set_state(b"first")
    assert two.get_state() is not None
    sealed = base64.b64decode(store.get(f"torch.rendezvous.{RUN}"))
    overwrite(store, RUN, sealed[:cut] + b"?" * 20)
    seen = two.get_state()
    assert seen is not None
    assert seen[0] == b"first"
    goes_on = two.set_state(b"second", seen[1])
    assert goes_on is not None
    assert goes_on[2]
    here = one.get_state()
    assert here is not None
    assert here[0] == b"second"


def test_a_forged_first_state_is_an_error_and_never_read() -> None:
    store, one, _ = pair()
    overwrite(store, RUN, pickle.dumps("anything"))
    for action in (one.get_state, lambda: one.set_state(b"first")):
        with pytest.raises(RendezvousStateError, match="this run's secret"):
            action()


def test_the_secret_is_made_once_and_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    first = run_secret(tmp_path)
    assert len(first) == 32
    assert run_secret(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [SECRET_FILE]
    assert stat.S_IMODE((tmp_path / SECRET_FILE).stat().st_mode) == 0o600
    (tmp_path / SECRET_FILE).chmod(0o640)
    with pytest.raises(LaunchError, match="-rw-r-----"):
        run_secret(tmp_path)
    (tmp_path / SECRET_FILE).chmod(0o600)
    (tmp_path / SECRET_FILE).write_text("no hex")
    with pytest.raises(LaunchError, match="cannot be read"):
        run_secret(tmp_path)
    (tmp_path / SECRET_FILE).unlink()
    (tmp_path / SECRET_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LaunchError):
        run_secret(tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setenv(SECRET, "short")
    with pytest.raises(LaunchError, match="5 bytes"):
        run_secret(tmp_path)
    monkeypatch.setenv(SECRET, "long enough for a secret")
    assert run_secret(tmp_path) == b"long enough for a secret"


def listeners(pid: int, descendants: bool = True) -> dict[int, set[str]]:
    """Ports on which a process and its descendants listen, each with its addresses."""
    found: dict[int, set[str]] = {}
    parent = psutil.Process(pid)
    for process in (parent, *(parent.children(recursive=True) if descendants else [])):
        try:
            connections = process.net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault(connection.laddr.port, set()).add(connection.laddr.ip)
    return found


def test_one_nodes_job_listens_on_loopback_and_obeys_no_forger(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    words = [
        "--nproc-per-node",
        "2",
        "--trainer.steps",
        "400",
        "--rdzv-id",
        RUN,
        "--checkpoint.memory-every-steps",
        "1",
    ]
    job = start_outlast("launch", config, *words, log=tmp_path / "log")
    try:
        wait_for(lambda: len(events(run, "step")) > 20)
        found = listeners(job.pid)
        assert found
        assert {ip for ips in found.values() for ip in ips} <= {"127.0.0.1", "::1"}, found
        mark = tmp_path / "was here"
        stores = [TCPStore("127.0.0.1", port, is_master=False) for port in listeners(job.pid, descendants=False)]
        attacked = [store for store in stores if store.check([f"torch.rendezvous.{RUN}"])]
        for store in attacked:
            overwrite(store, RUN, pickle.dumps(Payload(mark)))
        assert attacked
        done = len(events(run, "step"))
        wait_for(lambda: len(events(run, "step")) > done + 40)
        assert not mark.exists()
    finally:
        os.kill(job.pid, 15)
        job.wait(60)
    assert "without this run's MAC" in (tmp_path / "log").read_text()


def test_nodes_with_different_secrets_are_told(tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    jobs = []
    for node in (0, 1):
        config, _ = tiny_config(tmp_path, f"node{node}")  # run directories that are not shared
        words = ["--nproc-per-node", "1", "--nnodes", "2", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1"]
        (tmp_path / f"log{node}").touch()
        jobs.append(start_outlast("launch", config, *words, log=tmp_path / f"log{node}"))
    try:
        wait_for(lambda: any("share the run's directory" in (tmp_path / f"log{node}").read_text() for node in (0, 1)))
    finally:
        for job in jobs:
            os.kill(job.pid, 15)
        for job in jobs:
            job.wait(90)
