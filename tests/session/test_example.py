"""The example for the session, as it is documented: it learns, and killed and started again it ends the same."""

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

from outlast.free_port import free_port
from tests.forked import Job
from tests.helpers import clean_env, outlast, wait_for

PAGE = Path(__file__).parents[2] / "docs" / "session.md"


def documented(launcher: str) -> list[str]:
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith(launcher) and "char_gpt.py" in line]
    return shlex.split(line)


def run(folder: Path, root: Path, words: list[str]) -> str:
    """In a folder that has the examples."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(root / "examples")
    env = clean_env(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=str(root))
    done = subprocess.run(words, cwd=folder, env=env, text=True, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_it_learns(root: Path, tmp_path: Path) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run(tmp_path, root, documented("outlast launch")))]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 4.0  # of 5.5 at the start
    report = outlast("report", tmp_path / "runs" / "char_gpt").stdout
    assert "100 of 100 steps" in report


@pytest.mark.soak
def test_killed_and_started_again_it_ends_the_same(root: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    run(straight, root, [*documented("torchrun"), "--steps", "40"])
    words = [*documented("torchrun")[2:], "--steps", "40"]
    script = words.index("examples/char_gpt.py")
    words[script] = str(root / "examples" / "char_gpt.py")
    words[script + 1] = str(killed / "runs" / "char_gpt")
    log = tmp_path / "log"
    port = ["--master-port", str(free_port())]
    job = Job("torch.distributed.run", [*port, *words], env=clean_env(), stdout=log, stderr=log)
    wait_for(lambda: (killed / "runs/char_gpt/checkpoints/step_00000020/commit.json").exists())
    os.kill(job.pid, signal.SIGKILL)  # the ranks end with it, as on a node that is lost
    said = run(killed, root, [*documented("torchrun"), "--steps", "40"])
    assert "step 50" not in said
    folders = [place / "runs" / "char_gpt" / "checkpoints" for place in (straight, killed)]
    words = ["--step", "40", "--other-step", "40", "--json"]
    compared = json.loads(outlast("ckpt", "diff", *folders, *words, check=None).stdout)
    differing = {difference["name"] for kind in ("tensors", "values") for difference in compared[kind]}
    # Nothing seeds or uses these two, so each start has states of its own.
    assert all(name.startswith(("rng/numpy", "rng/python")) for name in differing), differing
    assert len(compared["equal_tensors"]) > 30


@pytest.mark.soak
@pytest.mark.mpi
def test_under_mpirun(root: Path, tmp_path: Path) -> None:
    words = documented("mpirun")
    assert "step 50: loss" in run(tmp_path, root, [words[0], "--oversubscribe", "--allow-run-as-root", *words[1:]])
