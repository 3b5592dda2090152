"""A Hugging Face Trainer in a session, on two ranks: it learns as well, and what breaks it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.tools import list_steps
from outlast.launch.failures import RESUME_STATUS
from tests.comm.ranks import Ranks
from tests.helpers import events
from tests.integrations.hf_training import Plan, said, train

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 8,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
}
"""Updates are compressed then, and an epoch has 8 steps."""


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def trained(ranks: Ranks, folder: Path, plan: Plan) -> dict[str, Any]:
    """Rank 0's end; of both if they are not alike."""
    folder.mkdir(exist_ok=True)
    ends = ranks.run(train, str(folder), plan)
    assert ends[0] == ends[1]
    return dict(ends[0])


def saved(folder: Path) -> list[int]:
    return [info.step for info in list_steps(folder / "run" / "checkpoints") if info.status == "committed"]


def but_steps(end: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in end.items() if name != "steps"}


@pytest.fixture(scope="module")
def straight(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How it ends if nothing happens."""
    return trained(two_ranks, tmp_path_factory.mktemp("straight"), Plan())


@pytest.mark.soak
def test_it_learns_as_dense_does(two_ranks: Ranks, tmp_path: Path) -> None:
    rate = {"learning_rate": 6e-3, "per_device_train_batch_size": 8}
    dense = trained(two_ranks, tmp_path / "dense", Plan(100, rate, plain=True))
    losses = {}
    for name, settings in {"gradient": {}, "update": {"max_grad_norm": 0.0}}.items():
        plan = Plan(100, rate | settings, comm={"density": 0.1})
        losses[name] = trained(two_ranks, tmp_path / name, plan)["loss"]
        steps = [one for one in events(tmp_path / name / "run", "step") if one.rank == 0]
        sent = sum(one["wire_bytes"] for one in steps) / sum(one["dense_bytes"] for one in steps)
        assert 0 < sent < 0.6, "small tensors are not compressed, and most of these are small"
    assert dense["loss"] < 0.3 * dense["history"][0]["loss"]
    assert all(loss < 1.02 * dense["loss"] for loss in losses.values()), (losses, dense["loss"])


def test_without_compression_nothing_changes(two_ranks: Ranks, tmp_path: Path) -> None:
    ends = [trained(two_ranks, tmp_path / name, Plan(8, plain=True)) for name in ("plain", "again")]
    assert ends[0] == ends[1], "the Trainer itself is deterministic"
    assert trained(two_ranks, tmp_path / "session", Plan(8, comm=False)) == ends[0]


def test_killed_it_goes_on_as_if_nothing_had_been(two_ranks: Ranks, tmp_path: Path, straight: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="SIGKILL"):
        trained(two_ranks, tmp_path, Plan(kill_at=14))
    done = saved(tmp_path)[-1]
    assert done in (8, 12)
    end = trained(two_ranks, tmp_path, Plan())
    assert end["steps"] == list(range(done + 1, 23))
    assert but_steps(end) == but_steps(straight), "history and counters of the Trainer included"
    logged = [one for one in events(tmp_path / "run", "step") if one.rank == 0 and one["loss"] is not None]
    assert [one["step"] for one in logged][-3:] == [18, 20, 22]


def test_longer_then_a_notice_then_a_damaged_step(two_ranks: Ranks, tmp_path: Path) -> None:
    """With accumulation, evaluation and compressed updates: none of it shows in the end."""
    plan = Plan(20, EVALUATED)
    straight = trained(two_ranks, tmp_path / "straight", plan)
    assert evaluated(straight) == [8, 16, 20]
    folder = tmp_path / "run"
    assert evaluated(trained(two_ranks, folder, replace(plan, steps=16))) == [8, 16]  # the end of an epoch
    assert trained(two_ranks, folder, replace(plan, notice_at=17)) == {"status": RESUME_STATUS, "step": 18}
    assert saved(folder)[-1] == 18
    chunk = next(path for path in (folder / "run/checkpoints/step_00000018/model").rglob("*") if path.is_file())
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    end = trained(two_ranks, folder, plan)
    assert end["steps"] == [17, 18, 19, 20], "after the step before, which is undamaged"
    assert but_steps(end) == but_steps(straight)
    again = trained(two_ranks, folder, plan)
    assert again["steps"] == [], "what is done is not done again"
    assert but_steps(again) == but_steps(straight)


def test_a_notice_comes_before_an_evaluation(two_ranks: Ranks, tmp_path: Path) -> None:
    assert trained(two_ranks, tmp_path, Plan(20, EVALUATED, notice_at=15)) == {"status": RESUME_STATUS, "step": 16}
    assert saved(tmp_path)[-1] == 16
    told = [one for one in events(tmp_path / "run", "logged") if one.rank == 0 and "eval_loss" in one["values"]]
    assert [one["step"] for one in told] == [8]


def test_what_it_cannot_do_is_refused_by_name(two_ranks: Ranks, tmp_path: Path) -> None:
    def refused(plan: Plan, **settings: Any) -> str:
        (line,) = {line for lines in two_ranks.run(said, str(tmp_path), plan, *settings.values()) for line in lines}
        return str(line)

    assert "SessionError: the Trainer uses auto_find_batch_size" in refused(
        Plan(settings={"auto_find_batch_size": True})
    )
    clipped = refused(Plan(comm={"target": "update"}))
    assert "comm.target = 'update' with max_grad_norm = 1" in clipped
    assert "max_grad_norm=0" in clipped
    assert not (tmp_path / "run").exists(), "before anything begins"
    assert "batches are drawn with the global random-number generators" in refused(Plan(4), masking=True)
    assert "the checkpoint is of step 4, but the Trainer ends at step 2" in refused(Plan(2))
    assert saved(tmp_path) == [4], "nothing is lost"


def evaluated(end: dict[str, Any]) -> list[int]:
    return [entry["step"] for entry in end["history"] if "eval_loss" in entry]
