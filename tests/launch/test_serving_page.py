"""The page beside a launcher, and beside no launcher: who serves it, who reaches it, and when it ends."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import stat
from pathlib import Path

import psutil
import pytest

from outlast.config import load
from outlast.diagnostics.page.config import PageConfig
from outlast.errors import ConfigError, OutOfRange, PortInUse
from outlast.free_port import free_port
from outlast.launch.serving_page import serving_page
from tests.diagnostics.report.synthetic import eventful
from tests.helpers import clean_env, outlast, start_outlast, tiny_config, wait_for
from tests.launch.jobs import STARTED

SCRIPT = Path(__file__).with_name("watched_program.py")
URL = re.compile(r"http://127\.0\.0\.1:(\d+)/#([\w-]{32,})\n")


def get(address: str, path: str) -> tuple[int, str]:
    """What is answered at an address as it stands in ``page.url``; status 0 if nothing is."""
    found = URL.fullmatch(f"{address.strip()}\n")
    assert found is not None, address
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {found[2]}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except ConnectionError:
        return 0, ""
    finally:
        connection.close()


def address_in(run: Path) -> str:
    path = run / "page.url"
    return wait_for(lambda: path.read_text() if path.exists() else "", every_s=0.1)  # type: ignore[no-any-return]


def pages(launcher: int) -> list[psutil.Process]:
    children = psutil.Process(launcher).children()
    return [one for one in children if "outlast.diagnostics.page" in one.cmdline()]


def test_a_launcher_serves_it_tells_a_hang_and_training_survives_what_serves(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = ("--nproc-per-node", "2", "--run-dir", run, "--page.port", "0", "--launch.told-after-s", "1")
    words += ("--shutdown-timeout", "1")
    job = start_outlast("launch", *words, SCRIPT, "100000", "--do", "stop", "--at", "40", log=log)
    STARTED.append(job)
    address = address_in(run)
    assert stat.S_IMODE((run / "page.url").stat().st_mode) == 0o600
    wait_for(lambda: get(address, "/report")[0] == 200, every_s=0.2)

    def hung() -> dict[str, object] | None:
        status, text = get(address, "/healthz")
        found: dict[str, object] = json.loads(text)
        return found if status == 503 and found["hung"] else None

    told = wait_for(hung, every_s=0.2)
    assert "rank 1 keeps its peers waiting at step 40: stopped (state T)" in told["verdict"]

    (page,) = pages(job.pid)
    page.kill()
    wait_for(lambda: "what serves the page was killed by signal 9; it is started again" in log.read_text())
    wait_for(lambda: get(address, "/report")[0] == 200, every_s=0.2)
    (page,) = pages(job.pid)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=60)
    wait_for(lambda: not page.is_running() or page.status() == psutil.STATUS_ZOMBIE)
    assert get(address, "/healthz")[0] == 0
    assert not (run / "page.url").exists(), "nothing is there any more"
    token = address.strip().partition("#")[2]
    assert "the whole address is in" in log.read_text()
    for path in (log, *run.rglob("*")):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_of_two_nodes_the_first_one_serves(tmp_path: Path) -> None:
    """Both are told to, on one port of one machine."""
    run, rendezvous, port = tmp_path / "run", f"127.0.0.1:{free_port()}", str(free_port())
    jobs = []
    for node in ("n0", "n1"):
        words = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", rendezvous, "--rdzv-id", "two")
        more = ("--run-dir", run, "--page.port", port)
        env = clean_env(SLURMD_NODENAME=node)
        jobs.append(start_outlast("launch", *words, *more, SCRIPT, "100000", log=tmp_path / node, env=env))
    STARTED.extend(jobs)
    address = address_in(run)
    wait_for(lambda: get(address, "/report")[0] == 200, every_s=0.2)
    said = [(tmp_path / node).read_text() for node in ("n0", "n1")]
    assert sorted("outlast: page at" in one for one in said) == [False, True]
    assert sorted(len(pages(job.pid)) for job in jobs) == [0, 1]


@pytest.mark.parametrize(
    "settings", ["port=70000", "token_file=x", "host=0.0.0.0", "port=0 host=0.0.0.0", "port=0 refresh_s=0"]
)
def test_settings_that_are_refused(settings: str) -> None:
    from outlast.cli.program_config import ProgramConfig

    overrides = {f"page.{key}": value for key, value in (one.split("=") for one in settings.split())}
    with pytest.raises(OutOfRange, match=r"page\."):
        load(ProgramConfig, environ={}, overrides=overrides)


def test_other_machines_are_let_in_with_a_token_of_yours_alone(tmp_path: Path) -> None:
    done = outlast("launch", "--page.port", "0", "--page.host", "0.0.0.0", SCRIPT, "1", check=2)
    assert "what other machines reach needs a token of yours" in done.stderr
    (tmp_path / "token").write_text("short")
    settings = PageConfig(port=0, host="0.0.0.0", token_file=str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"page\.token_file"):
        serving_page(settings, tmp_path, alone=True)
    (tmp_path / "token").write_text("0123456789abcdef\n")
    with serving_page(settings, tmp_path, alone=True):
        assert f"http://{socket.gethostname()}:" in (tmp_path / "page.url").read_text()


def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(PortInUse, match=r"page\.port"):
        serving_page(PageConfig(port=other.getsockname()[1]), tmp_path, alone=True)


def test_ranks_without_a_launcher_refuse_what_nobody_would_serve(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    done = outlast("train", config, "--page.port", "0", check=2)
    assert "[page] asks for a page, but no outlast launch runs here" in done.stderr
    assert not run.exists()


def test_without_a_launcher_the_report_command_serves_it(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    eventful(run, late_s={2: 0.05})
    job = start_outlast("report", run, "--live", log=log)
    STARTED.append(job)
    found = wait_for(lambda: URL.search(log.read_text()) if log.exists() else None, every_s=0.1)
    status, text = get(found[0], "/report")
    assert status == 200
    assert "Rank 2 on node-b is a straggler" in text
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=30) == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--port", "1"), "--port 1 is of no use without --live"),
        (("--live", "--json"), "--live and --json contradict one another"),
        (("--live", "--host", "0.0.0.0"), "opens the page to other machines, without a token of yours"),
    ],
)
def test_what_report_refuses(tmp_path: Path, words: tuple[str, ...], why: str) -> None:
    eventful(tmp_path)
    assert why in outlast("report", tmp_path, *words, check=2).stderr
