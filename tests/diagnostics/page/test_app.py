"""The page of a run over real HTTP, and in a real browser."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outlast.diagnostics import build_report, render_html
from outlast.diagnostics.page.app import RunPages
from outlast.diagnostics.page.health import health_of
from outlast.diagnostics.wsgi import WsgiServer, listen
from outlast.events import EventLog, ProgramStep, RunStarted, WorkersStarted
from outlast.launch.suspicions import HangSuspected
from tests.browser import CHROMIUM, Browser
from tests.diagnostics.report.synthetic import eventful
from tests.helpers import wait_for

TOKEN = "0123456789abcdef0123456789abcdef"


@contextmanager
def serving(run: Path, refresh_s: float = 1.0) -> Iterator[int]:
    """The run's page on a free port."""
    listening = listen("127.0.0.1", 0, "page.port")
    server = WsgiServer(listening, RunPages(run, TOKEN, refresh_s))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=30)


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def bearer(token: str = TOKEN) -> str:
    return f"Bearer {token}"


def test_without_the_token_nothing_of_the_run_is_told(tmp_path: Path) -> None:
    eventful(tmp_path / "run", late_s={2: 0.05})
    with serving(tmp_path / "run") as port:
        status, shell, headers = ask(port, "/")
        assert (status, headers["Cache-Control"], headers["X-Frame-Options"]) == (200, "no-store", "DENY")
        for said in (TOKEN, "straggler", "node-b", str(tmp_path)):
            assert said not in shell
        for given in ("", bearer(TOKEN + "x"), f"Basic {TOKEN}", bearer("\xff\xfe"), TOKEN):
            status, text, _ = ask(port, "/report", Authorization=given)
            assert status == 401
            assert "node-b" not in text
        assert ask(port, f"/report?token={TOKEN}")[0] == 401, "an address ends in logs"
        assert ask(port, "/nothing")[0] == 401
        assert set(json.loads(ask(port, "/healthz")[1])) == {"alive"}


def test_the_report_is_that_of_the_command_and_is_sent_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    eventful(run, late_s={2: 0.05})
    with serving(run) as port:
        status, text, headers = ask(port, "/report", Authorization=bearer())
        assert status == 200
        assert text == render_html(build_report(run))
        known = {"Authorization": bearer(), "If_None_Match": headers["ETag"]}
        assert ask(port, "/report", **known)[:2] == (304, "")
        assert ask(port, "/report", "HEAD", Authorization=bearer())[:2] == (200, "")
        assert ask(port, "/report", "POST", Authorization=bearer())[0] == 405
        assert ask(port, "/nothing", Authorization=bearer())[0] == 404


def begun(run: Path) -> tuple[EventLog, EventLog]:
    """A launcher's and a rank's events of a run that has done 3 steps."""
    ranks = run / "attempts" / "0001" / "events"
    ranks.mkdir(parents=True)
    (run / "events").mkdir()
    launcher = EventLog(run / "events" / "agent_h0.jsonl", rank=-1)
    launcher.write(WorkersStarted(host="h0", ranks=(0,), pids=(1,), restarts_left=3))
    rank = EventLog(ranks / "rank_00000.jsonl", rank=0)
    for step in (1, 2, 3):
        rank.write(ProgramStep(step=step, step_s=0.1, collective_s=0.01))
    return launcher, rank


def test_health_of_a_job_that_starts_runs_hangs_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert (health_of(run).alive, health_of(run).state) == (True, "starting")
    launcher, rank = begun(run)
    with launcher, rank, serving(run) as port:

        def told() -> dict[str, object]:
            found: dict[str, object] = json.loads(ask(port, "/healthz", Authorization=bearer())[1])
            return found

        assert ask(port, "/healthz")[:2] == (200, '{"alive": true}\n')
        now = told()
        assert (now["alive"], now["hung"], now["state"], now["step"], now["verdict"]) == (True, False, "running", 3, "")
        assert isinstance(now["last_step_age_s"], float)
        launcher.write(HangSuspected(culprit=0, pid=1, step=3, awaited_s=4.0, evidence="stopped (state T)"))
        wait_for(lambda: ask(port, "/healthz")[0] == 503, every_s=0.2)
        now = told()
        assert (now["alive"], now["hung"], now["step"]) == (False, True, 3)
        assert now["verdict"] == "rank 0 keeps its peers waiting at step 3: stopped (state T)"
        rank.write(ProgramStep(step=4, step_s=9.0, collective_s=0.01))
        wait_for(lambda: ask(port, "/healthz")[0] == 200, every_s=0.2)
        assert told()["verdict"] == ""


def test_a_run_that_has_told_nothing_yet_says_so(tmp_path: Path) -> None:
    with serving(tmp_path) as port:
        status, text, headers = ask(port, "/report", Authorization=bearer())
        assert (status, headers["Retry-After"]) == (503, "5")
        assert "contains no events" in text


def test_a_page_that_takes_long_is_not_computed_twice_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eventful(tmp_path)
    began: list[int] = []
    going = threading.Event()

    def slow(run_dir: Path) -> object:
        began.append(1)
        going.wait(60)
        return build_report(run_dir)

    monkeypatch.setattr("outlast.diagnostics.page.app.build_report", slow)
    monkeypatch.setattr("outlast.diagnostics.page.app.WAIT_S", 0.2)
    with serving(tmp_path) as port:
        for _ in range(3):
            status, text, _ = ask(port, "/report", Authorization=bearer())
            assert (status, text) == (503, "the report is being computed\n")
        assert ask(port, "/healthz")[0] in (200, 503), "others are answered"
        going.set()
        wait_for(lambda: ask(port, "/report", Authorization=bearer())[0] == 200, every_s=0.1)
        assert len(began) == 1, "and none is begun before nine times as long have gone by"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)")
def test_a_real_browser_shows_the_report_and_what_comes_later(tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher, rank = begun(run)
    rank.write(
        RunStarted(
            attempt=1, host="h0", pid=1, world_size=1, first_step=1, last_step=50, device="cpu", comm="", parameters=10
        )
    )
    with launcher, rank, serving(run) as port, Browser(tmp_path / "profile", f"http://127.0.0.1:{port}/#{TOKEN}") as b:

        def chips() -> str:
            return str(b.evaluate("document.querySelector('main')?.innerText", in_frame=True) or "")

        wait_for(lambda: "run report" in chips().lower(), every_s=0.1)
        assert "running, step 3" in b.evaluate("document.getElementById('bar').innerText")
        assert b.evaluate("document.querySelectorAll('svg').length", in_frame=True) > 0, "charts are drawn"
        assert b.evaluate("window.origin", in_frame=True) == "null", "it cannot see the token"
        b.evaluate("scrollTo(0, 200)", in_frame=True)
        wait_for(lambda: b.evaluate("scroll") > 0, every_s=0.05)
        for step in range(4, 40):
            rank.write(ProgramStep(step=step, step_s=0.1, collective_s=0.01))
        launcher.write(HangSuspected(culprit=0, pid=1, step=40, awaited_s=4.0, evidence="stopped <b>(state T)</b>"))
        wait_for(lambda: "39 of 50" in chips(), every_s=0.2)
        wait_for(lambda: b.evaluate("document.querySelectorAll('iframe').length") == 1, every_s=0.05)
        assert b.evaluate("scrollY", in_frame=True) > 0, "where it was scrolled to, it stays"
        wait_for(lambda: b.evaluate("document.getElementById('bar').className") == "bad", every_s=0.1)
        assert "stopped <b>(state T)</b>" in b.evaluate("document.getElementById('bar').innerText")
    assert TOKEN not in "".join(path.read_text() for path in run.rglob("*.jsonl"))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)")
def test_a_browser_without_the_token_is_told_where_it_is(tmp_path: Path) -> None:
    eventful(tmp_path / "run")
    with serving(tmp_path / "run") as port, Browser(tmp_path / "profile", f"http://127.0.0.1:{port}/#wrong") as b:
        wait_for(lambda: "RUN/page.url" in (b.evaluate("document.body?.innerText") or ""), every_s=0.1)
        assert b.evaluate("document.querySelectorAll('iframe').length") == 0
