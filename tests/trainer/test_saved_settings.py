"""What a resumed run may change takes effect and is printed; what it may not is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from outlast.errors import StateMismatch
from outlast.trainer.config import Config, ModelConfig, OptimConfig, RunConfig
from outlast.trainer.optim import lr_share
from outlast.trainer.saved_settings import changed_settings, saved_settings
from tests.helpers import arrays, events, outlast, steps_saved, tiny_config, values


def saved(config: Config) -> dict[str, Any]:
    """As they come back from a checkpoint."""
    return dict(json.loads(json.dumps(saved_settings(config))))


def test_settings_that_did_not_change_are_not_told() -> None:
    assert changed_settings(saved(Config()), Config(), 7) == []
    assert (
        changed_settings({}, Config(run=RunConfig(seed=5)), 7) == []
    )  # as checkpoints before these settings were saved


def test_every_change_is_told_with_both_values() -> None:
    now = Config(optim=OptimConfig(lr=5e-4, beta1=0.0), run=RunConfig(name="other", resume="auto"))
    assert changed_settings(saved(Config()), now, 7) == [
        "optim.lr: 0.001 -> 0.0005",
        "optim.beta1: not set -> 0.0",
    ]


@pytest.mark.parametrize("key", ["layers", "heads", "width", "context", "vocabulary"])
def test_the_model_may_not_change(key: str) -> None:
    now = Config(model=dataclasses.replace(ModelConfig(heads=2), **{key: 12}))
    with pytest.raises(StateMismatch, match=rf"step 7 .* model\.{key}: \d+ -> 12"):
        changed_settings(saved(Config(model=ModelConfig(heads=2))), now, 7)


def test_the_factory_of_the_model_may_not_change() -> None:
    def made(**settings: Any) -> Config:
        return Config(model=ModelConfig(factory="a:b", **settings))

    before = saved(made(arguments={"depth": 2, "width": 3}))
    assert changed_settings(before, made(arguments={"width": 3, "depth": 2}), 7) == []
    with pytest.raises(StateMismatch, match=r"model\.arguments: \{depth = 2, width = 3\} -> \{depth = 2, width = 4\}"):
        changed_settings(before, made(arguments={"width": 4, "depth": 2}), 7)
    with pytest.raises(StateMismatch, match=r'model\.factory: "a:b" -> not set'):
        changed_settings(before, Config(), 7)


def test_a_first_moment_may_not_appear_among_updates() -> None:
    before = saved(Config())
    now = Config(optim=OptimConfig(beta1=0.9))
    assert before["comm.target"] == "update"
    with pytest.raises(StateMismatch, match=r"optim\.beta1: not set -> 0\.9"):
        changed_settings(before, now, 7)


def test_a_resumed_run_trains_with_the_settings_it_was_given(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    outlast("launch", config, "--nproc-per-node", "2")
    outlast(
        *("launch", config, "--nproc-per-node", "2", "--resume", "15", "--optim.lr", "5e-4"),
        *("--optim.weight-decay", "0", "--data.batch-size", "3"),
    )
    logs = [(run / f"attempts/000{n}/logs/rank_00000.log").read_text() for n in (1, 2)]
    assert "changed since" not in logs[0]
    assert logs[1].count("changed since") == 3
    for change in ("optim.lr: 0.001 -> 0.0005", "optim.weight_decay: 0.1 -> 0.0", "data.batch_size: 4 -> 3"):
        assert f"changed since step 15: {change}" in logs[1]
    steps = [record for record in events(run, "step") if record.rank == 0]
    assert [record["step"] for record in steps] == [*range(1, 21), *range(16, 21)]
    for record in steps[20:]:
        share = lr_share(record["step"] - 1, OptimConfig(warmup_steps=5), 20)
        assert record["lr"] == pytest.approx(5e-4 * share, rel=1e-12)
        assert record["tokens"] == steps[0]["tokens"] * 3 // 4


def test_a_setting_that_may_not_change_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    config, run = tiny_config(tmp_path)
    outlast("launch", config, "--nproc-per-node", "1", "--trainer.steps", "10")
    before = {step: arrays(run / f"checkpoints/step_{step:08d}") for step in steps_saved(run)}
    for change, told in (
        (("--model.heads", "1"), "model.heads: 2 -> 1"),
        (("--run.seed", "1"), "run.seed: 0 -> 1"),
    ):
        done = outlast("launch", config, "--nproc-per-node", "1", "--resume", "auto", *change, check=None)
        assert done.returncode not in (0, 124)
        assert told in done.stdout + done.stderr
    assert {step: len(arrays(run / f"checkpoints/step_{step:08d}")) for step in steps_saved(run)} == {
        step: len(found) for step, found in before.items()
    }
    assert values(run / "checkpoints/step_00000010")["settings"]["model.heads"] == 2  # stock zarr shows them
