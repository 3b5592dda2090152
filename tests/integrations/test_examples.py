"""The integrations' examples, as they are documented, under ``outlast launch``: killed once, they learn and end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import clean_env, events, outlast, steps_saved, wait_for

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")


@pytest.mark.parametrize("name", ["accelerate_loop", "hf_trainer", "lightning_module"])
def test_the_page_shows_what_the_example_adds(name: str) -> None:
    source = (ROOT / "examples" / f"{name}.py").read_text()
    marked = [line.partition("  # outlast")[0].strip() for line in source.splitlines() if "  # outlast" in line]
    assert 2 <= len(marked) <= 3
    shown = [line[1:].strip() for line in PAGE.read_text().splitlines() if line.startswith("+")]
    assert all(line.replace("args.run", '"runs/mine"') in shown for line in marked), (marked, shown)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "learned"),
    [
        pytest.param("accelerate_loop", 0.1, marks=pytest.mark.soak),
        pytest.param("hf_trainer", 3.6, marks=pytest.mark.soak),
        pytest.param("lightning_module", 3.1, marks=pytest.mark.soak),
    ],
)
def test_it_learns_although_a_rank_is_killed(tmp_path: Path, name: str, learned: float) -> None:
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith("outlast") and f"{name}.py" in line]
    words = shlex.split(line)
    words[2:2] = ["--max-restarts", "1", "--launch.backoff-s", "0"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    env = clean_env(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=str(ROOT))
    run = tmp_path / words[words.index("--run-dir") + 1]
    with open(tmp_path / "log", "w+") as log:
        job = subprocess.Popen(words, cwd=tmp_path, env=env, text=True, stdout=log, stderr=log)
        try:
            wait_for(lambda: steps_saved(run)[-1:] >= [10], timeout_s=120)
            (pid,) = {one["pid"] for one in events(run, "run_started") if one.rank == 1 and one["last_step"]}
            os.kill(pid, signal.SIGKILL)
            assert job.wait(120) == 0, Path(log.name).read_text()[-3000:]
        finally:
            job.kill()
        said = Path(log.name).read_text()
    (loss, step) = re.findall(r"loss ([\d.]+) after step (\d+)", said)[-1]
    assert float(loss) < learned
    assert steps_saved(run)[-1] == int(step)
    assert len(events(run, "workers_failed")) == 1
    report = json.loads(outlast("report", run, "--json").stdout)
    assert report["facts"]["restarts"] == 1
    assert "goes on after step" in said
