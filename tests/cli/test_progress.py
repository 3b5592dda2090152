"""``outlast ckpt verify`` says how far it is: a bar on a terminal, lines elsewhere, nothing among JSON."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from outlast.cli.ckpt.progress import Verifying
from outlast.cli.main import main
from tests.checkpoint.helpers import save_steps


def test_lines_tell_bytes_rate_and_time_left_every_ten_seconds() -> None:
    now, lines = [100.0], io.StringIO()
    with Verifying(Console(file=io.StringIO()), json=False, lines=lines, clock=lambda: now[0]) as progress:
        progress.begin(4)
        for _ in range(25):
            now[0] += 1
            progress(4, int((now[0] - 100) * 2e8), int(5e9))
        assert progress.rate(int(5e9)) == "in 25.00 s, 200.0 MB/s"
        progress(3, 0, 100)
    assert lines.getvalue().splitlines() == [
        "step 4: 2.0 GB of 5.0 GB verified (40%), 200.0 MB/s, 15 s left",
        "step 4: 4.0 GB of 5.0 GB verified (80%), 200.0 MB/s, 5 s left",
    ]


def test_a_terminal_gets_a_bar_with_the_rate_and_no_lines() -> None:
    screen, lines, now = io.StringIO(), io.StringIO(), [0.0]
    console = Console(file=screen, force_terminal=True, width=120)
    with Verifying(console, json=False, lines=lines, clock=lambda: now[0]) as progress:
        for done in (1_000_000, 3_000_000):
            now[0] += 20
            progress(7, done, 4_000_000)
    assert "verifying step 7" in screen.getvalue()
    assert "3.0/4.0 MB" in screen.getvalue()
    assert not lines.getvalue()


def test_verify_ends_with_what_it_read_and_how_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 3, 4)
    assert main(["ckpt", "verify", str(tmp_path)]) == 0
    found = capsys.readouterr()
    assert len(re.findall(r"^step [34]: good, \d+ files, [\d.]+ kB in [\d.]+ s, [\d.]+ .?B/s$", found.out, re.M)) == 2
    assert not found.err
