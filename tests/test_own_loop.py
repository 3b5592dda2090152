"""The examples for people with their own loop, without a session: they learn, and go on bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from outlast.free_port import free_port
from tests.forked import Job
from tests.helpers import arrays, clean_env, outlast, steps_saved, torchrun, wait_for


def losses_in(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]


@pytest.mark.soak
def test_it_learns_and_goes_on(root: Path, tmp_path: Path) -> None:
    command = [root / "examples" / "own_loop.py", tmp_path / "a"]
    losses = losses_in(torchrun(*command))
    assert losses[-1] < losses[0] / 2
    newest = tmp_path / "a" / "step_00000200"
    straight = arrays(newest)
    shutil.rmtree(newest)
    assert "going on from step 180" in torchrun(*command)
    again = arrays(newest)
    assert straight.keys() == again.keys()
    assert all(straight[name].tobytes() == again[name].tobytes() for name in straight)


def test_killed_at_any_moment_it_ends_like_a_run_that_was_not(root: Path, tmp_path: Path) -> None:
    """Dropout included: what the ranks' generators drop next is part of the state."""
    script = [root / "tests" / "fewer_steps.py", "100", root / "examples" / "own_loop.py"]
    torchrun(*script, tmp_path / "straight")
    words = ["--nproc-per-node", "2", "--master-port", str(free_port()), *map(str, script), str(tmp_path / "killed")]
    log = tmp_path / "log"
    job = Job("torch.distributed.run", words, env=clean_env(), stdout=log, stderr=log)
    wait_for(lambda: (tmp_path / "killed/step_00000040/commit.json").exists())
    os.kill(job.pid, signal.SIGKILL)  # the ranks end with it, as on a node that is lost
    wait_for(lambda: not ranks_of(tmp_path / "killed"))
    assert "going on from step" in torchrun(*script, tmp_path / "killed")
    same = ["--step", "100", "--other-step", "100", "--json"]
    compared = json.loads(outlast("ckpt", "diff", tmp_path / "straight", tmp_path / "killed", *same, check=None).stdout)
    differing = {difference["name"] for kind in ("tensors", "values") for difference in compared[kind]}
    # Nothing seeds or uses these two, so each start has states of its own.
    assert all(name.startswith(("rng/numpy", "rng/python")) for name in differing), differing
    assert len(compared["equal_tensors"]) > 10


@pytest.mark.soak
def test_torchrun_restarts_it(root: Path, tmp_path: Path) -> None:
    """As the docs say, with a store for each start: rank 0 is killed, and then rank 1."""
    folder = tmp_path / "a"
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "4", "--monitor-interval", "0.1"]
    script = [root / "tests" / "killed_at.py", "25,46", root / "examples" / "own_loop.py", "100", folder]
    log = tmp_path / "log"
    env = clean_env(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    job = Job("torch.distributed.run", [*words, *map(str, script)], env=env, stdout=log, stderr=log)
    try:
        assert job.wait(150) == 0, log.read_text()[-4000:]
    finally:
        ranks_of(folder)
    assert log.read_text().count("going on from step 20") == 2
    assert log.read_text().count("going on from step 40") == 2


def ranks_of(folder: Path) -> list[int]:
    """Processes that were started to save in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in (process.info["cmdline"] or []):
            process.kill()
            found.append(process.pid)
    return found


@pytest.mark.soak
def test_deepspeed_learns(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'outlast[deepspeed]'")
    script, run = root / "tests" / "deepspeed_script.py", tmp_path / "run"
    command = ["launch", "--nproc-per-node", "2", "--run-dir", run, script, root / "examples/deepspeed_loop.py"]
    losses = losses_in(outlast(*command, env=clean_env(DS_ACCELERATOR="cpu")).stdout)
    assert losses[-1] < losses[0] / 2
    assert steps_saved(run)[-1] == 100
