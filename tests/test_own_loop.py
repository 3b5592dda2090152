"""The examples for people with their own loop: they learn, and go on bit for bit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers import arrays, torchrun


def losses_in(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]


@pytest.mark.parametrize(
    ("example", "steps"), [("own_loop", 200), pytest.param("fsdp_loop", 100, marks=pytest.mark.slow)]
)
def test_it_learns_and_goes_on(root: Path, tmp_path: Path, example: str, steps: int) -> None:
    command = [root / "tests" / "fewer_steps.py", str(steps), root / "examples" / f"{example}.py", tmp_path / "a"]
    if steps == 200:  # as it is documented
        command = command[2:]
    losses = losses_in(torchrun(*command))
    assert losses[-1] < losses[0] / 2
    newest = tmp_path / "a" / f"step_{steps:08d}"
    straight = arrays(newest)
    shutil.rmtree(newest)
    assert f"going on from step {steps - 20}" in torchrun(*command)
    again = arrays(newest)
    assert straight.keys() == again.keys()
    assert all(straight[name].tobytes() == again[name].tobytes() for name in straight)


@pytest.mark.slow
def test_deepspeed_learns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'outlast[deepspeed]'")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    losses = losses_in(torchrun(root / "tests" / "deepspeed_script.py", root / "examples" / "deepspeed_loop.py"))
    assert losses[-1] < losses[0] / 2
