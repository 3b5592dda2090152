"""A loop with Accelerate in a session, on two ranks: it learns as well, and goes on inside an epoch bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

from outlast.checkpoint.tools import list_steps
from outlast.errors import OutlastError, SessionError
from outlast.launch.failures import RESUME_STATUS
from tests.comm.ranks import Ranks
from tests.helpers import events
from tests.integrations.hf_training import as_launched
from tests.session.program import digest, network

pytest.importorskip("accelerate")


@dataclass(frozen=True, slots=True)
class Loop:
    """One start of a loop."""

    steps: int = 25
    """Of the run; an epoch has 8 batches on each of two ranks, and four steps."""
    comm: Any = None
    plain: bool = False
    """Without outlast."""
    clip: bool = False
    seedable: bool = False
    lr: float = 1e-2
    kill_at: int = 0
    notice_at: int = 0
    stop_at: int = 0


def loop(rank: int, folder: str, plan: Loop) -> dict[str, Any]:
    """What became of it on this rank."""
    from accelerate import Accelerator, DataLoaderConfiguration

    from outlast.integrations.accelerate import AcceleratedSession

    as_launched(rank, folder)
    torch.manual_seed(3)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1250, 8, generator=random)
    y = x.square().mean(dim=1, keepdim=True) + 0.5 * torch.randn(1250, 1, generator=random)
    data = torch.utils.data.TensorDataset(x[:250], y[:250])  # the rest is held out
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=plan.seedable),
    )
    bare = network()
    optimizer: Any = torch.optim.AdamW(bare.parameters(), lr=plan.lr)
    scheduler: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=200)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(bare, optimizer, loader, scheduler)
    losses: list[float] = []

    def train(batches: Iterator[Any]) -> None:
        for step, (inputs, target) in enumerate(batches):
            with accelerator.accumulate(model):
                loss = mse_loss(model(inputs), target)
                accelerator.backward(loss)
                if plan.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if accelerator.sync_gradients and session is not None:
                step = session.done_step + 1
                if step == plan.kill_at and rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                if step == plan.notice_at and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if step == plan.stop_at:
                    break

    def epochs() -> Iterator[Any]:
        done = 0
        while True:
            for batch in loader:
                yield batch
                done += accelerator.sync_gradients
                if done == plan.steps:
                    return

    session = None
    try:
        if plan.plain:
            train(epochs())
        else:
            with AcceleratedSession(
                accelerator,
                "run",
                model,
                optimizer,
                comm=plan.comm,
                checkpoint={"every_steps": 3},
                scheduler=scheduler,
            ) as session:
                train(session.batches(loader, plan.steps))
    except SystemExit as end:
        return {"status": end.code}
    except OutlastError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "weights": digest(bare),
        "lr": scheduler.get_last_lr(),
        "losses": losses[-4:],
        "loss": float(mse_loss(bare.eval()(x[250:]), y[250:]).detach()),
    }


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def ends(ranks: Ranks, folder: Path, plan: Loop) -> list[Any]:
    folder.mkdir(exist_ok=True)
    return ranks.run(loop, str(folder), plan)


def saved(folder: Path) -> list[int]:
    return [info.step for info in list_steps(folder / "run" / "checkpoints") if info.status == "committed"]


def test_without_compression_nothing_changes(two_ranks: Ranks, tmp_path: Path) -> None:
    plain = ends(two_ranks, tmp_path / "plain", Loop(plain=True))
    assert plain == ends(two_ranks, tmp_path / "again", Loop(plain=True)), "Accelerate itself is deterministic"
    assert plain == ends(two_ranks, tmp_path / "session", Loop(comm=False))
    assert plain[0]["losses"] != plain[1]["losses"]


def test_killed_stopped_or_warned_it_goes_on_inside_the_epoch(two_ranks: Ranks, tmp_path: Path) -> None:
    """At 14, whose epoch has begun at 13; at 16, which ends one; at 20, by the loop's own will."""
    straight = ends(two_ranks, tmp_path / "straight", Loop())
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match="SIGKILL"):
        ends(two_ranks, folder, Loop(kill_at=14))
    assert 9 <= saved(folder)[-1] <= 12
    assert ends(two_ranks, folder, Loop(notice_at=15)) == [{"status": RESUME_STATUS}] * 2
    assert saved(folder)[-1] == 16
    ends(two_ranks, folder, Loop(stop_at=18))
    assert saved(folder)[-1] == 18
    assert ends(two_ranks, folder, Loop()) == straight
    assert ends(two_ranks, folder, Loop())[0]["weights"] == straight[0]["weights"], "what is done is not done again"
    assert not {one["wire_bytes"] for one in events(folder / "run", "step")} & {0}


@pytest.mark.slow
def test_it_learns_as_dense_does(two_ranks: Ranks, tmp_path: Path) -> None:
    plan = Loop(120, lr=1e-2, seedable=True)
    dense = ends(two_ranks, tmp_path / "dense", replace(plan, plain=True, clip=True))[0]["loss"]
    assert dense < 0.32, "of 0.5 for the best constant, and 0.25 for the best function"
    for name, comm, clip in (
        ("update", {"density": 0.2}, False),
        ("gradient", {"target": "gradient", "feedback": "ef21", "density": 0.2}, True),
    ):
        loss = ends(two_ranks, tmp_path / name, replace(plan, comm=comm, clip=clip))[0]["loss"]
        assert loss < 1.02 * dense, name


@pytest.mark.parametrize(("sharers", "batches"), [(1, 14), (2, 7), (3, 4), (4, 3)])
def test_the_place_of_other_ranks(sharers: int, batches: int) -> None:
    """14 of the loader's batches were taken by two ranks; none of the others is left out."""
    from outlast.integrations.accelerate import PlaceInData

    place, before = PlaceInData(sharers), PlaceInData(2)
    before.epoch, before.batches = 3, 7
    place.load_state_dict(before.state_dict())
    assert (place.epoch, place.batches) == (3, batches)


def misused(rank: int, folder: str) -> list[str]:
    """What is said to a program that hands over something else than it should."""
    from accelerate import Accelerator

    from outlast.integrations.accelerate import AcceleratedSession

    as_launched(rank, folder)
    accelerator = Accelerator(cpu=True)
    bare: Any = torch.nn.Linear(2, 1)
    data = torch.utils.data.TensorDataset(torch.ones(8, 2))
    loader: Any = torch.utils.data.DataLoader(data)
    empty: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(0, 2)))
    model = accelerator.prepare(bare)
    said = []
    with pytest.raises(SessionError) as unprepared:
        AcceleratedSession(accelerator, "run", bare)
    said.append(str(unprepared.value))
    with pytest.raises(SessionError) as not_a_part:
        AcceleratedSession(accelerator, "run", model, comm=False, scheduler=3)
    said.append(str(not_a_part.value))
    with AcceleratedSession(accelerator, "run", model, comm=False, checkpoint=False) as session:
        with pytest.raises(SessionError) as unprepared:
            next(session.batches(loader, 2))
        said.append(str(unprepared.value))
        with pytest.raises(SessionError) as nothing:
            next(session.batches(accelerator.prepare(empty), 2))
        said.append(str(nothing.value))
    return said


def test_misuse_is_told(two_ranks: Ranks, tmp_path: Path) -> None:
    (clipped,) = {end["error"] for end in ends(two_ranks, tmp_path / "clipped", Loop(clip=True))}
    assert "clip" in clipped
    (tmp_path / "misused").mkdir()
    model, part, loader, empty = two_ranks.run(misused, str(tmp_path / "misused"))[0]
    assert "the Linear is not prepared" in model
    assert "session.add(scheduler=...): a int has no state_dict" in part
    assert "the DataLoader is not prepared" in loader
    assert "the loader has no batches" in empty
