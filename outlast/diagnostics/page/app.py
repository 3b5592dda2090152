"""What is answered over HTTP: the page, the report in it, and whether the job is well."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from outlast.diagnostics.page.health import Health, health_of
from outlast.diagnostics.page.on_demand import OnDemand
from outlast.diagnostics.port_token import carries
from outlast.diagnostics.report.build import build_report
from outlast.diagnostics.report.html import render_html
from outlast.errors import OutlastError

HEALTH_AGE_S = 1.0
"""Health is looked up at most this often; each look reads the ends of all event files."""
WAIT_S = 5.0
"""How long a request waits for what is being computed; then it gets what there was before."""
STALE_S = 60.0
"""Health that could not be found out for so long is no health."""
HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
)

Start = Callable[[str, list[tuple[str, str]]], Any]


@dataclass(frozen=True, slots=True)
class Page:
    """The report at one moment."""

    html: bytes
    tag: str
    """Differs between pages that differ."""
    problem: str
    """Why there is none; else empty."""


class RunPages:
    """A WSGI application for one run.

    ``/`` is a page without anything of the run in it, whose script takes the token from the address's fragment, which
    no browser sends, and asks for ``/report`` with it. ``/healthz`` answers with 200 or 503; to whoever has the token,
    with why. Everything else needs ``Authorization: Bearer TOKEN``.

    Args:
        run_dir: the run's directory.
        token: what requests must carry.
        refresh_s: how often the report is computed at most, and asked for by the page.
    """

    def __init__(self, run_dir: Path, token: str, refresh_s: float) -> None:
        self._run_dir = run_dir
        self._token = token
        self._shell = _shell(run_dir.resolve().name, refresh_s)
        self._page = OnDemand(self._compute, refresh_s, "outlast-page")
        self._health = OnDemand(lambda: health_of(run_dir), HEALTH_AGE_S, "outlast-health")

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        """Answer a request."""
        method, path = str(environ.get("REQUEST_METHOD")), str(environ.get("PATH_INFO"))
        if method not in ("GET", "HEAD"):
            return _answer(start, "405 Method Not Allowed", b"only GET\n", more=[("Allow", "GET, HEAD")])
        knows = carries(environ, self._token)
        if path == "/":
            found = _answer(start, "200 OK", self._shell, "text/html; charset=utf-8")
        elif path == "/healthz":
            found = self._answer_health(start, knows=knows)
        elif not knows:
            words = b"this needs the run's token: Authorization: Bearer TOKEN\n"
            found = _answer(start, "401 Unauthorized", words, more=[("WWW-Authenticate", "Bearer")])
        elif path == "/report":
            found = self._answer_report(start, str(environ.get("HTTP_IF_NONE_MATCH", "")))
        else:
            found = _answer(start, "404 Not Found", b"there are /, /report and /healthz\n")
        return found if method == "GET" else []

    def _answer_report(self, start: Start, known: str) -> Iterable[bytes]:
        made = self._page.get(WAIT_S)
        if made is None or made.value.problem:
            why = "the report is being computed" if made is None else made.value.problem
            return _answer(start, "503 Service Unavailable", f"{why}\n".encode(), more=[("Retry-After", "5")])
        more = [("ETag", made.value.tag), ("X-Outlast-Made", f"{made.t:.3f}")]
        if known == made.value.tag:
            return _answer(start, "304 Not Modified", b"", more=more)
        return _answer(start, "200 OK", made.value.html, "text/html; charset=utf-8", more=more)

    def _answer_health(self, start: Start, *, knows: bool) -> Iterable[bytes]:
        made = self._health.get(WAIT_S)
        health = None if made is None or made.age_s > STALE_S else made.value
        status = "200 OK" if health is not None and health.alive else "503 Service Unavailable"
        told = {"alive": health is not None and health.alive}
        if knows:
            told = _unknown() if health is None else health.to_json()
        return _answer(start, status, json.dumps(told).encode() + b"\n", "application/json")

    def _compute(self) -> Page:
        try:
            html = render_html(build_report(self._run_dir)).encode()
        except (OutlastError, OSError) as error:
            return Page(b"", "", str(error).replace("\n", "; "))
        return Page(html, f'"{hashlib.sha256(html).hexdigest()[:32]}"', "")


def _unknown() -> dict[str, Any]:
    words = "the run's directory could not be read in time"
    return Health(alive=False, hung=False, state="unknown", step=0, last_step_age_s=None, verdict=words).to_json()


def _answer(
    start: Start,
    status: str,
    body: bytes,
    kind: str = "text/plain; charset=utf-8",
    more: Iterable[tuple[str, str]] = (),
) -> Iterable[bytes]:
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *HEADERS, *more])
    return [body]


def _shell(name: str, refresh_s: float) -> bytes:
    folder = files("outlast.diagnostics.page") / "assets"
    text = (folder / "shell.html").read_text(encoding="utf-8")
    script = (folder / "shell.js").read_text(encoding="utf-8")
    return (
        text.replace("{{name}}", escape(name))
        .replace("{{refresh_ms}}", str(round(1e3 * refresh_s)))
        .replace("{{js}}", script)
        .encode()
    )
