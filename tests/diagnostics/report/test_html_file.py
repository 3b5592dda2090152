"""Where ``outlast report --html`` writes: never through a link to nothing, and readers never see half a page."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from outlast.diagnostics import build_report
from outlast.diagnostics.report import html_file
from outlast.diagnostics.report.html_file import write_html
from outlast.errors import DiagnosticsError
from tests.diagnostics.report.synthetic import SyntheticRun


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = SyntheticRun(run_dir=tmp_path / "run", ranks=1, steps=3)
    made.start()
    made.train(1, 3)
    return tmp_path / "run"


def test_a_page_is_made_and_replaced(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    (tmp_path / "link.html").symlink_to(page)
    for target in (page, tmp_path / "link.html", tmp_path / "new.html"):
        write_html(build_report(run), target)
        assert "<html" in target.read_text()
    assert (tmp_path / "link.html").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "new.html", "page.html", "run"]


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    report = build_report(run)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "x")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (
        ("link", "is a symbolic link to .*, which does not exist"),
        ("folder", "it is a folder"),
        ("pipe", "no regular file"),
        ("nowhere/x", "does not exist"),
    ):
        with pytest.raises(DiagnosticsError, match=said):
            write_html(report, tmp_path / name)
    assert list((tmp_path / "folder").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe", "run"]


def test_a_failure_leaves_the_old_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    monkeypatch.setattr(html_file, "render_html", lambda report: "x" * 10_000_000)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiagnosticsError, match="cannot be written"):
            write_html(build_report(run), page)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert page.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]
