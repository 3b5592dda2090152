"""A session in a loop that is somebody else's: it is told where steps begin and end. One rank, in this process."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import outlast
from outlast.checkpoint.tools import list_steps
from outlast.errors import CheckpointNotFound, SessionError, StateMismatch
from outlast.events import StepDone, read_events
from outlast.launch.runner import RUN_DIR
from outlast.session.saved_parts import newest_parts


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "TORCHELASTIC_RUN_ID", RUN_DIR):
        monkeypatch.delenv(name, raising=False)


class Position:
    """Where a loop of others is in its data."""

    epoch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


def trained(run: Path, last: int, *, stop: int = 0, error: Exception | None = None) -> tuple[nn.Linear, int]:
    """A library's trainer, as it were: it calls back, and ends after ``last`` or, with the error, after ``stop``."""
    torch.manual_seed(0)
    model, position = nn.Linear(4, 1), Position()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    session = outlast.Session(run, model, optimizer, checkpoint={"every_steps": 2})
    session.add(replicated=True, position=position)
    done = session.begin(last)
    for _ in range(done, stop or last):
        assert session.begin_step() == session.done_step + 1
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        position.epoch += 10
        session.log(lr=0.1)
        assert not session.end_step()
    session.close(error)
    session.close()  # once is enough
    return model, done


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    straight, _ = trained(tmp_path / "straight", 7)
    trained(tmp_path / "run", 7, stop=5, error=ValueError("a batch that cannot be read"))
    step, parts = newest_parts(tmp_path / "run")
    assert step == 4  # the fifth was not durable when the error came
    assert parts["position"] == {"epoch": 40}
    again, done = trained(tmp_path / "run", 7)
    assert done == 4
    assert torch.equal(straight.weight, again.weight)
    assert newest_parts(tmp_path / "run")[1]["position"] == {"epoch": 70}
    assert newest_parts(tmp_path / "run", resume=4) == (4, parts)
    ends = [
        [(one["step"], one["ok"], one["reason"]) for one in read_events(file) if one.kind == "run_ended"]
        for file in sorted((tmp_path / "run" / "attempts").glob("0*/events/rank_00000.jsonl"))
    ]
    assert ends == [[(5, False, "ValueError: a batch that cannot be read")], [(7, True, "")]]


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    assert newest_parts(tmp_path) == (0, {})
    trained(tmp_path, 2)
    assert newest_parts(tmp_path, resume="never") == (0, {})
    assert newest_parts(tmp_path, checkpoint=False) == (0, {})
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 9"):
        newest_parts(tmp_path, resume=9)
    with outlast.Session(tmp_path / "bare", nn.Linear(1, 1)) as session:
        list(session.steps(1))
    with pytest.raises(StateMismatch, match="parts"):
        newest_parts(tmp_path / "bare")


def test_calls_out_of_turn(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    session = outlast.Session(tmp_path, model)
    with pytest.raises(SessionError, match="without a session"):
        session.end_step()
    with pytest.raises(SessionError, match="the last step is 0"):
        session.begin_step()
    assert session.begin(1) == 0
    with pytest.raises(SessionError, match="called twice"):
        session.steps(1)
    session.begin_step()
    with pytest.raises(SessionError, match="step 1 has not ended"):
        session.begin_step()
    session.end_step()
    with pytest.raises(SessionError, match="the last step is 1"):
        session.begin_step()
    session.close()
    assert [one.step for one in list_steps(tmp_path / "checkpoints")] == [1], "nothing is lost"


def test_what_a_trainer_needs(tmp_path: Path) -> None:
    """A notice in the middle of a step ends that step; data and evaluations have times and phases of their own."""
    model = nn.Linear(1, 1)
    seen: list[StepDone] = []

    def after_step(done: StepDone) -> None:
        seen.append(done)
        with session.evaluating(changes=False):
            time.sleep(0.05)

    with outlast.Session(tmp_path, model, checkpoint={"every_steps": 100}) as session:
        for step in session.steps(9, after_step):
            with session.loading():
                time.sleep(0.01)
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            session.ask_notice()
            session.log(loss=1.0, grad_norm=2.0, more=3.0)
        assert session.end()
    assert (session.done_step, session.ended_by) == (3, "notice (SIGTERM)")
    assert [(one.step, one.grad_norm) for one in seen] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert all(0.01 <= one.data_s <= one.step_s for one in seen)
    assert [one.step for one in list_steps(tmp_path / "checkpoints")] == [3]
    (file,) = (tmp_path / "attempts").glob("0*/events/rank_00000.jsonl")
    ended = [(one["step"], one["ok"], one["reason"]) for one in read_events(file) if one.kind == "run_ended"]
    assert ended == [(3, True, "notice (SIGTERM)")]
