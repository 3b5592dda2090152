"""What a session says to a program that uses it wrongly, and that nothing is lost by it. One rank, in this process."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

import outlast
from outlast.checkpoint import attach, load
from outlast.checkpoint.tools import list_steps
from outlast.errors import OutOfRange, RunDirectoryError, SessionError, StateMismatch, UnknownKey
from outlast.events import read_events
from outlast.launch.runner import RUN_DIR

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "SLURM_PROCID",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_SIZE",
        "TORCHELASTIC_RUN_ID",
        RUN_DIR,
    ):
        monkeypatch.delenv(name, raising=False)


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def train(run: Path, model: nn.Module, last: int, *, stop: int = 0, **settings: Any) -> outlast.Session:
    """Steps on the same batch; ``stop`` leaves the loop after that step's update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with outlast.Session(run, model, optimizer, **settings) as session:
        for step in session.steps(last):
            loss = session.model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss, twice=2 * loss)
            if step == stop:
                break
    return session


def steps(run: Path) -> list[int]:
    return [info.step for info in list_steps(run / "checkpoints") if info.status == "committed"]


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    straight, halves = net(), net()
    train(tmp_path / "straight", straight, 9)
    session = train(tmp_path / "run", halves, 4)
    assert steps(tmp_path / "run") == [4]
    assert session.run_dir == tmp_path / "run"
    again = net()
    train(tmp_path / "run", again, 9)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))
    assert [path.name for path in sorted((tmp_path / "run" / "attempts").iterdir())] == ["0001", "0002", "latest"]
    records = list(read_events(tmp_path / "run" / "attempts" / "0002" / "events" / "rank_00000.jsonl"))
    assert [one["step"] for one in records if one.kind == "step"] == [5, 6, 7, 8, 9]
    assert all(one["values"].keys() == {"twice"} for one in records if one.kind == "logged")
    assert [(one["first_step"], one["last_step"]) for one in records if one.kind == "run_started"] == [(5, 9)]
    assert [(one["step"], one["ok"]) for one in records if one.kind == "run_ended"] == [(9, True)]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    train(tmp_path, net(), 4)
    model = net()
    train(tmp_path, model, 4)  # no step is left
    with pytest.raises(StateMismatch, match="the checkpoint is of step 4, but the loop ends at step 3"):
        train(tmp_path, net(), 3)
    assert steps(tmp_path) == [4]


def test_a_loop_that_is_left_saves_what_it_did(tmp_path: Path) -> None:
    train(tmp_path, net(), 20, stop=7)
    assert steps(tmp_path) == [7]


def test_an_error_is_the_programs_own(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())

    def loop() -> None:
        with outlast.Session(tmp_path, model, optimizer, checkpoint={"every_steps": 1}) as session:
            for step in session.steps(5):
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()
                _ = 1 / (step - 3)

    with pytest.raises(ZeroDivisionError):
        loop()
    records = list(read_events(tmp_path / "attempts" / "0001" / "events" / "rank_00000.jsonl"))
    (ended,) = [one for one in records if one.kind == "run_ended"]
    assert (ended["step"], ended["ok"], ended["reason"]) == (2, False, "ZeroDivisionError: division by zero")
    assert steps(tmp_path) == [1, 2]
    train(tmp_path, net(), 3)  # its directory is free again


def test_one_session_a_run(tmp_path: Path) -> None:
    with outlast.Session(tmp_path, net()):
        with pytest.raises(RunDirectoryError, match=r"this process has a Session on .* already"):
            outlast.Session(tmp_path, net())
        outlast.Session(tmp_path / "other", net()).close()
    outlast.Session(tmp_path, net()).close()


def test_a_used_directory_is_refused_to_a_run_that_begins(tmp_path: Path) -> None:
    train(tmp_path, net(), 2)
    with pytest.raises(RunDirectoryError, match="already contains a run") as caught:
        train(tmp_path, net(), 2, resume="never")
    assert 'resume="auto"' in caught.value.fix
    assert steps(tmp_path) == [2]


def test_the_launchers_directory_is_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_DIR, str(tmp_path / "watched"))
    with pytest.raises(
        RunDirectoryError, match=r"watches this run in .*watched, but Session was given .*mine"
    ) as caught:
        outlast.Session(tmp_path / "mine", net())
    assert f"--run-dir {tmp_path / 'mine'}" in caught.value.fix
    assert not (tmp_path / "mine").exists()


def test_an_earlier_step(tmp_path: Path) -> None:
    train(tmp_path, net(), 6, checkpoint={"every_steps": 2})
    model = net()
    session = train(tmp_path, model, 3, resume=2)
    assert session.resume() == 3
    assert steps(tmp_path) == [2, 3]


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_parts_of_ones_own(tmp_path: Path) -> None:
    for last, expected in ((3, 3), (5, 5)):
        model, counter = net(), Counter()
        optimizer = torch.optim.AdamW(model.parameters())
        with outlast.Session(tmp_path, model, optimizer) as session:
            session.add(counter=counter)
            for _ in session.steps(last):
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()
                counter.count += 1
        assert counter.count == expected


def test_a_part_that_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, net(), 2)
    counter = Counter()
    with caplog.at_level(logging.WARNING), outlast.Session(tmp_path, net()) as session:
        session.add(counter=counter)
        assert session.resume() == 2
    assert "step 2: there is no counter: it goes on as it is" in caplog.text


def test_what_cannot_be_added(tmp_path: Path) -> None:
    model = net()
    with outlast.Session(tmp_path, model) as session:
        with pytest.raises(SessionError, match=r"add\(plan=\.\.\.\): a list has no state_dict and no load_state_dict"):
            session.add(plan=[1, 2])
        session.add(counter=Counter())
        with pytest.raises(SessionError, match="there is a part of this name"):
            session.add(counter=Counter())
        with pytest.raises(SessionError, match="the session saves this already"):
            session.add(again=model)
        session.resume()
        with pytest.raises(SessionError, match="after the run was resumed"):
            session.add(late=Counter())


def test_steps_are_asked_for_once(tmp_path: Path) -> None:
    with outlast.Session(tmp_path, net()) as session:
        list(session.steps(1))
        with pytest.raises(SessionError, match="called twice"):
            session.steps(2)


def test_a_model_that_changes(tmp_path: Path) -> None:
    model = nn.Sequential(net(), nn.Linear(1, 1))

    def loop() -> None:
        with outlast.Session(tmp_path, model, checkpoint={"every_steps": 2}) as session:
            for step in session.steps(4):
                if step == 1:
                    model.append(nn.Linear(1, 1))
                    model[0] = nn.Linear(5, 1)

    with pytest.raises(SessionError, match=r"new: 2\.bias, 2\.weight; of another shape: 0\.weight"):
        loop()


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"model": [1]}, SessionError, "the model is a list"),
        ({"model": {}}, SessionError, "models by name"),
        ({"model": nn.DataParallel(nn.Linear(4, 1))}, SessionError, "the model is a DataParallel"),
        ({"optimizer": 3}, SessionError, "the optimizer is a int"),
        ({"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)])}, SessionError, "1 of the optimizer's"),
        ({"optimizer": {"net": None}}, SessionError, "optimizers .'net'. for models"),
        ({"resume": "sometimes"}, SessionError, "resume = 'sometimes'"),
        ({"resume": -1}, SessionError, "resume = -1"),
        ({"checkpoint": {"every_step": 3}}, UnknownKey, "checkpoint has no setting every_step"),
        ({"checkpoint": {"every_steps": 0}}, OutOfRange, "checkpoint.every_steps"),
    ],
    ids=str,
)
def test_arguments(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        outlast.Session(tmp_path / "run", **({"model": net()} | arguments))
    assert not (tmp_path / "run").exists()


def test_without_checkpoints(tmp_path: Path) -> None:
    train(tmp_path, net(), 3, checkpoint=False)
    assert not (tmp_path / "checkpoints").exists()


def test_batches_of_loaders_are_known_and_nothing_stays_changed(tmp_path: Path) -> None:
    callbacks, following = list(gc.callbacks), _BaseDataLoaderIter.__next__
    model = net()
    loader = DataLoader(TensorDataset(torch.ones(6, 4)), batch_size=2)
    with outlast.Session(tmp_path, model, torch.optim.SGD(model.parameters()), checkpoint=False) as session:
        batches = iter(loader)
        for _ in session.steps(3):
            session.model(next(batches)[0]).sum().backward()
    records = list(read_events(tmp_path / "attempts" / "0001" / "events" / "rank_00000.jsonl"))
    done = [one for one in records if one.kind == "step"]
    assert [one["batch_elements"] for one in done] == [8, 8, 8]
    assert all(0 < one["data_s"] < one["step_s"] for one in done)
    assert (gc.callbacks, _BaseDataLoaderIter.__next__) == (callbacks, following)


def test_any_pace(tmp_path: Path) -> None:
    """With ``auto`` the interval follows what a save costs; the last step is saved in any case."""
    train(tmp_path, net(), 30, checkpoint={"every_steps": "auto"})
    assert steps(tmp_path)[-1] == 30


def test_another_optimizers_state(tmp_path: Path) -> None:
    train(tmp_path, net(), 2)
    model = net()
    optimizer = torch.optim.SGD([{"params": [one]} for one in model.parameters()], lr=0.1)
    with (
        pytest.raises(StateMismatch, match="the optimizer's state in the checkpoint does not fit SGD"),
        outlast.Session(tmp_path, model, optimizer) as session,
    ):
        session.resume()


def test_the_models_buffers_are_in_its_checkpoint(tmp_path: Path) -> None:
    def normed() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    model, same = normed(), normed()
    train(tmp_path / "run", model, 2)
    saved = load(tmp_path / "run" / "checkpoints")
    same.load_state_dict(saved.replicated["model"])
    older = {name: saved.replicated["model"][name] for name, _ in model.named_parameters()}
    with attach(tmp_path / "old" / "checkpoints") as saver:  # as sessions once laid it out
        saver.save(2, replicated=saved.replicated | {"model": older}, local=saved.local, eager=saved.replicated)
    again = normed()
    assert train(tmp_path / "old", again, 2).done_step == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        assert torch.equal(value, again.state_dict()[name])
