"""Draws the pictures of reports from real runs: ``python docs/report_pictures.py [FOLDER [NAME ...]]``; needs chromium.

In one run a rank is killed, in one it is stopped, and in one it is slow in steps 12 to 44. Each takes two ranks and
about a minute.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from outlast.diagnostics.live import heartbeat_path, read_heartbeat, shm_directory
from outlast.errors import DiagnosticsError

ROOT = Path(__file__).parents[1]
KILLED_AT, SLOW = 37, "0.4@12-44"
WIDTH, SCALE = 1100, 0.8
HEIGHTS = {"report_killed": 808, "report_stopped": 1085, "report_slow": 808}
CONFIG = """
[run]
dir = "{dir}"

[model]
layers = 2
heads = 2
width = 48
context = 48

[data]
files = ["{{stdlib}}/*.py"]
batch_size = 8

[trainer]
steps = 60
eval_every_steps = 20

[checkpoint]
every_steps = 5
"""


def config_of(run: Path) -> Path:
    path = run.with_suffix(".toml")
    path.write_text(CONFIG.format(dir=run))
    return path


def killed(run: Path) -> None:
    """Kill rank 1 of a run under ``outlast launch`` in the middle; it recovers."""
    _signalled(run, signal.SIGKILL)


def stopped(run: Path) -> None:
    """Stop rank 1 of a run under ``outlast launch`` in the middle; the launcher finds it, and the run recovers."""
    _signalled(run, signal.SIGSTOP)


def _signalled(run: Path, number: signal.Signals) -> None:
    words = ["-m", "outlast", "launch", str(config_of(run)), "--nproc-per-node", "2"]
    job = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    beat = heartbeat_path(shm_directory(run), 1)
    pid = 0
    while pid == 0:
        if job.poll() is not None:
            raise SystemExit(f"the run ended with status {job.returncode} before rank 1 could be killed")
        try:
            found = read_heartbeat(beat) if beat.exists() else None
        except DiagnosticsError:  # its header is being written
            found = None
        pid = found.pid if found is not None and found.step >= KILLED_AT else 0
        time.sleep(0.001)
    os.kill(pid, number)
    if job.wait(timeout=600):
        raise SystemExit("the run did not recover")


def slow(run: Path) -> None:
    """Slow rank 1 down for a part of the run."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(ROOT / "tests" / "slow_rank.py")
    subprocess.run([sys.executable, *words, script, "1", SLOW, str(config_of(run))], cwd=ROOT, check=True, timeout=600)


RUNS = {"report_killed": killed, "report_stopped": stopped, "report_slow": slow}


def photograph(page: Path, picture: Path, height: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
    size = [f"--window-size={WIDTH},{height}", f"--force-device-scale-factor={SCALE}"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    subprocess.run([browser, *flags, *size, profile, f"--screenshot={picture}", page.as_uri()], check=True, timeout=120)


def main(folder: Path, names: Sequence[str]) -> None:
    """Run, report, photograph."""
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            make = RUNS[name]
            run = Path(place) / name.replace("report_", "")
            make(run)
            page = Path(place) / f"{name}.html"
            words = ["-m", "outlast", "report", str(run)]
            subprocess.run([sys.executable, *words, "--html", str(page)], cwd=ROOT, check=True)
            said = subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, text=True)
            print(said.stdout)
            photograph(page, folder.resolve() / f"{name}.png", HEIGHTS[name])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent, sys.argv[2:] or list(RUNS))
