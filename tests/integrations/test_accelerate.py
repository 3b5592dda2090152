"""A loop with Accelerate in a session, on two ranks: it learns as well, and goes on inside an epoch bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.tools import list_steps
from outlast.errors import SessionError
from outlast.launch.failures import RESUME_STATUS
from tests.comm.ranks import Ranks
from tests.helpers import events
from tests.integrations.accelerate_training import Loop, loop
from tests.integrations.hf_training import as_launched

pytest.importorskip("accelerate")


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
