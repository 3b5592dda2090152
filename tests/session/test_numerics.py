"""The watch on numbers in a session: one argument, on one rank in this process, and on ranks that average."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import outlast
from outlast.errors import NonFiniteGradient, OutOfRange, TrainingDiverged, UnknownKey
from outlast.events import Record, read_events
from tests.comm.ranks import Ranks
from tests.diagnostics.numerics.test_not_finite import Net, batch, spoiled

UPDATES = {"density": 0.1, "dense_below": 8}
GRADIENTS = UPDATES | {"target": "gradient"}


def train(rank: int, run: str, faulty: int, **settings: Any) -> list[Record]:
    """Six steps; in the fourth a module of rank ``faulty`` fails. The events of this rank."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    session = outlast.Session(run, model, optimizer, notice_grace_s=None, **settings)
    expected = NonFiniteGradient if settings.get("comm", {}) is not False else TrainingDiverged
    with pytest.raises(expected) as caught:
        steps(session, model, optimizer, rank, faulty)
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    where = f"on rank {faulty} alone" if ranks > 1 else "here"
    assert f"the first module whose output is not finite is blocks.1 (Faulty), {where}: its inputs are finite" in said
    return list(read_events(Path(run) / "attempts" / "0001" / "events" / f"rank_{rank:05d}.jsonl"))


def steps(session: outlast.Session, model: Net, optimizer: torch.optim.Optimizer, rank: int, faulty: int) -> None:
    with session:
        for step in session.steps(6):
            if step == 4 and rank == faulty:
                model.blocks[1].spoil = spoiled(float("nan"))
            loss = session.model(batch(rank))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.usefixtures("alone")
def test_one_rank(tmp_path: Path) -> None:
    records = train(0, str(tmp_path), 0, numerics=True, comm=False)
    (told,) = [one for one in records if one.kind == "not_finite"]
    assert (told["step"], told["module"], told["ranks"]) == (4, "blocks.1", [0])
    assert [one["ok"] for one in records if one.kind == "run_ended"] == [False]


@pytest.mark.parametrize("comm", [False, GRADIENTS, UPDATES], ids=["dense", "gradients", "updates"])
def test_ranks_name_the_one_at_fault_with_and_without_compression(two_ranks: Ranks, tmp_path: Path, comm: Any) -> None:
    for records in two_ranks.run(train_with, str(tmp_path), comm):
        (told,) = [one for one in records if one.kind == "not_finite"]
        assert (told["step"], told["module"], told["ranks"]) == (4, "blocks.1", [1])


def train_with(rank: int, run: str, comm: Any) -> list[Record]:
    return train(rank, run, 1, numerics={"replicas_every_steps": 2}, comm=comm, checkpoint=False)


@pytest.mark.usefixtures("alone")
def test_a_spike_of_the_logged_loss_is_an_event_and_settings_are_checked(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with outlast.Session(tmp_path, model, optimizer, numerics=True, checkpoint=False) as session:
        for step in session.steps(40):
            loss = session.model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss.detach() * (9 if step == 30 else 1) + 1)
    records = list(read_events(tmp_path / "attempts" / "0001" / "events" / "rank_00000.jsonl"))
    spikes = [(one["step"], one["what"], one["state"]) for one in records if one.kind == "numerics_spike"]
    assert spikes == [(30, "loss", "began"), (33, "loss", "over")]
    with pytest.raises(UnknownKey, match="numerics has no setting replicas_every"):
        outlast.Session(tmp_path / "other", model, optimizer, numerics={"replicas_every": 3})
    with pytest.raises(OutOfRange, match=r"numerics\.spike_sigmas"):
        outlast.Session(tmp_path / "other", model, optimizer, numerics={"spike_sigmas": 0})
