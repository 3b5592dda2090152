"""The documentation builds as a site without a warning, and its reference holds what each room shows."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

if find_spec("sphinx") is None or find_spec("myst_parser") is None:
    pytest.skip("sphinx and myst-parser are not installed: pip install 'outlast[docs]'", allow_module_level=True)

ROOMS = ("comm", "checkpoint", "diagnostics", "launch", "trainer")


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (ROOT / "docs/index.rst").read_text().split()
    for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/api/*.rst")]:
        assert str(page.relative_to(ROOT / "docs").with_suffix("")) in contents


@pytest.mark.slow
def test_the_site_builds_and_refers_to_all_that_rooms_show(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for room in ROOMS:
        page = (tmp_path / f"api/{room}.html").read_text()
        for name in importlib.import_module(f"outlast.{room}").__all__:
            assert f"outlast.{room}." in page
            assert f'{name}"' in page, f"{room}: {name} is not in the reference"
