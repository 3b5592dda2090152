"""Metrics of a program while it runs: they survive its ranks' restarts, and training survives them."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from outlast.diagnostics.report.goodput import CAUSES
from outlast.free_port import free_port
from tests.helpers import clean_env, events, outlast, start_outlast, wait_for
from tests.launch.jobs import STARTED

pytestmark = pytest.mark.prometheus
SCRIPT = Path(__file__).with_name("watched_program.py")


def metrics(port: int) -> dict[str, float]:
    """All samples by ``name{labels}``, without the run's name; empty while nothing answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return {}
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[re.sub(r'run="[^"]*",|,?run="[^"]*"', "", name).replace("{}", "")] = float(value)
    return found


def exporters(launcher: int) -> list[psutil.Process]:
    children = psutil.Process(launcher).children()
    return [one for one in children if "outlast.diagnostics.export" in one.cmdline()]


@pytest.mark.slow
def test_metrics_survive_restarts_and_training_survives_what_exports_them(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ("--nproc_per_node", "2", "--run-dir", run, "--export.prometheus-port", "0", "--export.run-name", "mine")
    job = start_outlast("launch", *words, SCRIPT, "100000", "--do", "kill", log=log)
    STARTED.append(job)
    wait_for(log.exists)
    port = int(wait_for(lambda: re.search(r"127\.0\.0\.1:(\d+)/metrics", log.read_text()))[1])

    def after_restart() -> dict[str, float] | None:
        found = metrics(port)
        return found if found.get("outlast_restarts_total") == 1 and found.get("outlast_step", 0) > 10 else None

    found = wait_for(after_restart)
    assert found['outlast_verdicts_total{syndrome="crash"}'] == 1
    assert found["outlast_ranks"] == 2
    seconds = {cause: found[f'outlast_goodput_seconds_total{{cause="{cause}"}}'] for cause in CAUSES}
    assert seconds["restart"] > 0
    assert seconds["useful"] > 0
    began = events(run, "workers_started")[0].t
    assert sum(seconds.values()) == pytest.approx(found["outlast_last_event_timestamp_seconds"] - began, abs=0.5)

    (exporter,) = exporters(job.pid)
    exporter.kill()
    wait_for(lambda: "is started again, training goes on" in log.read_text())
    again = wait_for(after_restart)
    assert again["outlast_step_seconds_count"] >= found["outlast_step_seconds_count"], "it reads from the beginning"
    assert len(events(run, "workers_failed")) == 1

    (exporter,) = exporters(job.pid)
    psutil.Process(job.pid).kill()
    job.wait(timeout=60)
    wait_for(lambda: not exporter.is_running() or exporter.status() == psutil.STATUS_ZOMBIE)


def test_the_end_waits_for_no_client(tmp_path: Path) -> None:
    """A short run ends although somebody holds a connection open, and its port is closed."""
    run = tmp_path / "run"
    began_s = time.monotonic()
    done = outlast("launch", "--run-dir", run, "--export.prometheus-port", "0", "--no-python", "sh", "-c", "sleep 1")
    assert time.monotonic() - began_s < 60
    port = int(re.search(r"127\.0\.0\.1:(\d+)/metrics", done.stderr)[1])  # type: ignore[index]
    assert metrics(port) == {}


@pytest.mark.slow
def test_a_client_that_is_broken_ends_no_training(tmp_path: Path) -> None:
    """It is there, as the launcher has seen before any rank started, and cannot be imported."""
    (tmp_path / "prometheus_client").mkdir()
    (tmp_path / "prometheus_client" / "__init__.py").write_text("raise RuntimeError('a broken installation')")
    words = ("--run-dir", tmp_path / "run", "--export.prometheus-port", "0", "--no-python", "sh", "-c", "sleep 8")
    done = outlast("launch", *words, env=clean_env(PYTHONPATH=str(tmp_path)))
    assert "a broken installation" in done.stderr
    assert "what exports metrics exited with status 1; it is started again, training goes on" in done.stderr


def test_a_dry_run_opens_no_port(tmp_path: Path) -> None:
    done = outlast("launch", "--dry-run", "--run-dir", tmp_path / "run", "--export.prometheus-port", "0", SCRIPT, "1")
    assert "metrics at" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_each_node_tells_of_its_own_ranks(tmp_path: Path) -> None:
    """Two launchers with names of their own share a run's directory, as on shared storage."""
    run, rendezvous = tmp_path / "run", f"127.0.0.1:{free_port()}"
    ports = []
    for node in ("n0", "n1"):
        log = tmp_path / node
        words = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", rendezvous)
        more = ("--rdzv-id", "two", "--run-dir", run, "--export.prometheus-port", "0")
        env = clean_env(SLURMD_NODENAME=node)
        STARTED.append(start_outlast("launch", *words, *more, SCRIPT, "100000", log=log, env=env))
        wait_for(log.exists)
        ports.append(int(wait_for(lambda log=log: re.search(r"127\.0\.0\.1:(\d+)/metrics", log.read_text()))[1]))
    found = [
        wait_for(lambda port=port: metrics(port) if metrics(port).get("outlast_step", 0) > 10 else None)
        for port in ports
    ]
    for node, one in zip(("n0", "n1"), found, strict=True):
        assert one["outlast_ranks"] == 1
        assert f'outlast_run_info{{comm="",device="",host="{node}"}}' in one
        assert 0 <= one["outlast_step_seconds_count"] - one["outlast_step"] + 1 <= 1, (
            "steps of one rank, but for the first"
        )
        assert one['outlast_goodput_seconds_total{cause="useful"}'] > 0
        assert one["outlast_restarts_total"] == 0
