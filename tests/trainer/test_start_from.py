"""A run that begins with another run's parameters: with those alone, and only while it has no checkpoint of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint import load
from outlast.errors import ConfigError
from outlast.trainer.config import RunConfig
from tests.helpers import outlast, tiny_config

STILL = ("--optim.lr", "1e-20", "--optim.weight_decay", "0", "--trainer.steps", "2")


def model_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    back: dict[str, torch.Tensor] = load(run / "checkpoints", step, parts=("model",)).replicated["model"]
    return back


def test_parameters_of_another_run(tmp_path: Path) -> None:
    config, base = tiny_config(tmp_path, "base")
    outlast("train", config, "--trainer.steps", "3", "--checkpoint.every_steps", "3")
    tuned = tmp_path / "tuned"
    begin = ("--run.dir", tuned, "--run.start_from", base / "checkpoints")
    said = outlast("train", config, *begin, *STILL, "--run.seed", "7")
    assert f"begins with the parameters of step 3 of {base}/checkpoints" in said.stdout + said.stderr
    want, got = model_of(base, 3), model_of(tuned, 2)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)

    words = ("--run.dir", tmp_path / "other", "--model.context", "32", "--data.batch_size", "4")
    source = ("--run.start_from", base / "checkpoints")
    refused = outlast("train", config, *words, *source, *STILL, check=1)
    assert "run.start_strict = false" in refused.stdout + refused.stderr
    more = ("--run.resume", "auto", "--run.start_strict", "false")
    said = outlast("train", config, *words, *source, *STILL, *more)
    assert "not taken: " in said.stdout + said.stderr
    other = model_of(tmp_path / "other", 2)
    fitting = [name for name in want if want[name].shape == other[name].shape]
    assert 0 < len(fitting) < len(want)
    assert all(torch.equal(want[name], other[name]) for name in fitting)

    shutil.rmtree(base)
    again = outlast("train", config, *begin, "--run.seed", "7", "--trainer.steps", "3", "--run.resume", "auto")
    assert "restored step 2" in again.stdout + again.stderr
    gone = outlast("train", config, "--run.dir", tmp_path / "new", *source, check=1)
    assert "no checkpoint at" in gone.stdout + gone.stderr


@pytest.mark.parametrize(
    "settings",
    [{"start_from": ""}, {"start_step": 3}, {"start_strict": False}, {"start_from": "x", "start_step": -1}],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"run\.start_"):
        RunConfig(**settings)
