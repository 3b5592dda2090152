from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from outlast.diagnostics import build_report, render_html
from outlast.events import CheckpointFailed, RunEnded
from outlast.plain_text import plain_text
from tests.diagnostics.report.synthetic import SyntheticRun, clean, eventful

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&\u2028\"'"


class Checker(HTMLParser):
    """Fails on elements that do not nest; keeps what was opened, and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[tuple[str, str, str]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.loads += [(tag, name, values[name]) for name in ("src", "href", "srcset", "action") if name in values]
        assert not any(name.startswith("on") for name in values), attrs
        if tag == "script":
            self._script = values.get("id", "code")
            self.scripts[self._script] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] += data


def parse(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_it_is_one_well_formed_file_that_loads_nothing(tmp_path: Path) -> None:
    eventful(tmp_path, late_s={2: 0.05})
    page = render_html(build_report(tmp_path))
    checker = parse(page)
    assert checker.loads == []
    assert not {"link", "iframe", "img", "object", "embed"} & set(checker.tags)
    assert not re.search(r"@import|url\(", page)
    for address in re.findall(r"https?://[^\s\"'<)]+", page):
        assert address == "http://www.w3.org/2000/svg"  # a name of XML, nothing that is fetched
    assert "default-src 'none'" in page
    assert "{{" not in page


def test_it_says_who_the_straggler_is_and_what_happened(tmp_path: Path) -> None:
    eventful(tmp_path, late_s={2: 0.05})
    page = render_html(build_report(tmp_path))
    assert "Rank 2 on node-b is a straggler" in page
    assert "rank 3 hung in step 49" in page
    data = json.loads(parse(page).scripts["data"])
    assert data["heat"]["ranks"] == [0, 1, 2, 3]
    assert data["heat"]["guilty"] == [False, False, True, False]
    assert len(data["heat"]["mean"][2]) == 60
    assert data["loss"]["eval_steps"] == [20, 40, 60]
    assert data["restart_steps"] == [31]


def test_without_a_straggler_it_says_so(tmp_path: Path) -> None:
    clean(tmp_path)
    page = render_html(build_report(tmp_path))
    assert "No straggler" in page
    assert 'class="verdict good"' in page


def test_text_from_events_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<b>run & co"
    run = SyntheticRun(run_dir=folder, ranks=2, steps=20)
    run.start(hosts=[HOSTILE, "node<b>"])
    run.train(1, 20)
    run.write(run.logs[0], CheckpointFailed(step=20, reason=HOSTILE))
    run.write(run.logs[1], RunEnded(step=20, ok=False, reason=HOSTILE))
    run.end()
    page = render_html(build_report(folder))
    checker = parse(page)
    assert checker.tags.count("script") == 2
    assert "img" not in checker.tags
    assert "alert('x')</script>" not in page
    assert json.loads(checker.scripts["data"])["heat"]["hosts"][0] == plain_text(HOSTILE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_runs_with_little_to_show(tmp_path: Path, ranks: int) -> None:
    run = SyntheticRun(run_dir=tmp_path, ranks=ranks)
    run.start()
    parse(render_html(build_report(tmp_path)))
    run.train(1, 1)
    parse(render_html(build_report(tmp_path)))
    run.end()


def test_thousands_of_steps_are_binned(tmp_path: Path) -> None:
    clean(tmp_path, ranks=3, steps=3000, checkpoint_every=100, eval_every=100, late_s={1: 0.05})
    page = render_html(build_report(tmp_path))
    data = json.loads(parse(page).scripts["data"])
    assert len(data["heat"]["bins"]) <= 240
    assert data["heat"]["bins"][0][0] == 1
    assert data["heat"]["bins"][-1][1] == 3000
    assert len(data["loss"]["train"]) == len(data["loss"]["bins"]) <= 600
    assert len(page) < 200_000


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def drawn_by_browser(page: Path, profile: Path, *, limit_s: float = 60) -> str:
    """The document as the browser has it when the scripts have run."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += [f"--user-data-dir={profile}", "--window-size=1600,2000", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=limit_s)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)")
def test_a_real_browser_draws_all_charts_and_clips_no_column(tmp_path: Path) -> None:
    eventful(tmp_path / "run", late_s={2: 0.05})
    page = tmp_path / "report.html"
    # nothing of the page may fail in silence: an error of the script becomes part of the page
    caught = "<script>addEventListener('error', (e) => { document.title = 'ERROR ' + e.message; });</script>"
    clipped = """<script>
      const narrow = [1600, 1200, 1100, 1040].map((width) => {
        document.querySelector("main").style.width = `${width}px`;
        const tables = [...document.querySelectorAll(".scroll")];
        return tables.filter((one) => one.scrollWidth > one.clientWidth).map((one) => `${width}: ${one.innerText}`);
      });
      document.body.dataset.clipped = JSON.stringify(narrow.flat());
    </script>"""
    text = render_html(build_report(tmp_path / "run")).replace("<title>", caught + "<title>", 1)
    page.write_text(text.replace("</body>", f"{clipped}</body>", 1))
    dom = drawn_by_browser(page, tmp_path / "profile")
    assert "ERROR" not in re.findall(r"<title>(.*?)</title>", dom)[0]
    for chart in ("scene", "heat", "loss", "split", "time"):
        drawn = dom.split(f'id="{chart}"', 1)[1].split("</section>", 1)[0]
        assert "<svg" in drawn, chart
    assert "<canvas" in dom
    (narrow,) = re.findall(r'data-clipped="(.*?)"', dom, re.DOTALL)
    assert json.loads(unescape(narrow)) == []
