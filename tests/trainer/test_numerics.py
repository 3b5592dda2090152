"""Numbers that go wrong in a run of the trainer: what it says, what its events and its report say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import events, outlast, steps_saved

MODEL = """
import os
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
    def forward(self, x):
        return self.linear(x).relu()

class Net(nn.Module):
    calls = 0
    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(256, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 256)
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        self.faulty = first and os.environ.get("RANK", "0") == os.environ["FAULTY"]
        self.blocks[1].linear.register_forward_hook(self.fault)
    def fault(self, module, args, output):
        if self.faulty and Net.calls == {call}:
            {fault}
        return output
    def forward(self, x, y):
        Net.calls += self.training and torch.is_grad_enabled()
        x = self.token(x)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), y.flatten())
"""
NAN = "return output * torch.nan"
FLIP = "module.weight.data.view(torch.int32)[3, 3] ^= 1 << 20"
CONFIG = """
[run]
dir = "{run}"
[model]
factory = "faulty:Net"
context = 16
[data]
files = ["{{stdlib}}/[a-c]*.py"]
batch_size = 4
[trainer]
steps = 8
eval_every_steps = 0
eval_batches = 1
[checkpoint]
every_steps = 2
[comm]
target = "gradient"
feedback = "ef21"
density = 0.1
"""


def made(folder: Path, fault: str, call: int) -> tuple[Path, Path]:
    """A config and its run directory."""
    (folder / "faulty.py").write_text(MODEL.replace("{call}", str(call)).replace("{fault}", fault))
    config, run = folder / "config.toml", folder / "run"
    config.write_text(CONFIG.format(run=run))
    return config, run


@pytest.mark.parametrize("compressor", ["dense", "topk"])
def test_one_rank_names_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressor: str) -> None:
    config, run = made(tmp_path, NAN, 3)
    monkeypatch.setenv("FAULTY", "0")
    said = outlast("train", config, "--comm.compressor", compressor, check=1).stderr
    where = "the first module whose output is not finite is blocks.1.linear (Linear), here: its inputs are finite"
    assert where in said
    assert ("NonFiniteGradient" if compressor == "topk" else "TrainingDiverged") in said
    (told,) = events(run, "not_finite")
    assert (told["step"], told["module"], told["ranks"]) == (3, "blocks.1.linear", [0])
    first, *_ = outlast("report", run).stdout.splitlines()
    assert "at step 3" in first
    report = json.loads(outlast("report", run, "--json").stdout)
    assert [(row["step"], row["kind"], row["severity"]) for row in report["numerics"]] == [(3, "not_finite", "bad")]
    assert where in report["numerics"][0]["told"]


@pytest.mark.soak
def test_a_flipped_bit_ends_a_run_that_stops_for_it_and_it_goes_on_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = made(tmp_path, FLIP, 4)
    monkeypatch.setenv("FAULTY", "1")
    words = ["--numerics.replicas_every_steps", "2", "--numerics.replicas_action", "stop"]
    said = outlast("launch", config, "--nproc-per-node", "2", *words)
    assert "ranks 0, 1 differ; of two, none is the odd one, in blocks.1.linear.weight" in said.stdout + said.stderr
    told = events(run, "replicas_different")
    assert {(one.rank, one["step"], one["equal_at"], one["parameter"]) for one in told} == {
        (rank, 4, 2, "blocks.1.linear.weight") for rank in (0, 1)
    }
    # Step 4 was not saved from either, and done again from step 2.
    assert [one["first_step"] for one in events(run, "run_started")] == [1, 1, 3, 3]
    assert steps_saved(run) == [4, 6, 8]  # the newest three
    first, *_ = outlast("report", run).stdout.splitlines()
    assert "replicas are not the same" in first.lower()
