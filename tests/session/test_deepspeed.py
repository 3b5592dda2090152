"""A session for a DeepSpeed engine, ZeRO 0 to 3, on two real ranks over gloo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import outlast.checkpoint.deepspeed
from outlast.checkpoint.tools import list_steps
from outlast.errors import CheckpointError, CommError, OutlastError, SessionError, StateMismatch
from outlast.events import read_events
from outlast.launch.failures import RESUME_STATUS
from tests.comm.deepspeed.test_deepspeed import load as load_deepspeed
from tests.comm.ranks import Ranks
from tests.helpers import clean_env, events, steps_saved
from tests.helpers import outlast as outlast_command
from tests.session.deepspeed_program import COMPRESSED, STEPS, engine_of, train, weights
from tests.session.program import Draws, digest, network

PROGRAM = Path(__file__).with_name("deepspeed_program.py")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, prepare=load_deepspeed)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("stage", "accumulate", "comm"),
    [
        pytest.param(0, 1, None, id="zero0"),
        pytest.param(1, 2, None, id="zero1", marks=pytest.mark.soak),
        pytest.param(2, 2, COMPRESSED, id="zero2"),
        pytest.param(3, 2, False, id="zero3"),
    ],
)
def test_it_goes_on_bit_for_bit(two_ranks: Ranks, tmp_path: Path, stage: int, accumulate: int, comm: Any) -> None:
    straight = two_ranks.run(run_straight, str(tmp_path / "straight"), stage, accumulate, comm)
    halves = two_ranks.run(run_in_parts, str(tmp_path / "halves"), stage, accumulate, comm)
    assert halves == straight


def run_straight(rank: int, run: str, stage: int, accumulate: int, comm: Any, last: int = 6) -> str:
    return train(run, last, stage, accumulate, comm=comm)


def run_in_parts(rank: int, run: str, stage: int, accumulate: int, comm: Any) -> str:
    """Left in step 3, and ended by a notice to rank 1 in the step after."""
    train(run, 6, stage, accumulate, stop=3, comm=comm)
    with pytest.raises(SystemExit) as ended:
        train(run, 6, stage, accumulate, notice=4, comm=comm)
    assert ended.value.code == RESUME_STATUS
    return train(run, 6, stage, accumulate, comm=comm)


@pytest.mark.soak
def test_killed_it_ends_as_if_it_had_not_been(two_ranks: Ranks, tmp_path: Path) -> None:
    """Under ``outlast launch``; the straight run has the ranks of the other tests."""
    straight = two_ranks.run(run_straight, str(tmp_path / "straight"), 2, 2, COMPRESSED, STEPS)
    run, kills = tmp_path / "run", tmp_path / "kills"
    kills.mkdir()
    (kills / "5-1").touch()
    done = outlast_command(
        *("launch", "--nproc-per-node", "2", "--max-restarts", "1", "--run-dir", run, "--launch.backoff-s", "0"),
        *(ROOT / "tests" / "deepspeed_script.py", PROGRAM, run, kills),
        env=clean_env(DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT)),
        timeout_s=300,
    )
    (end,) = [line.split("end ")[1] for line in done.stdout.splitlines() if "end " in line]  # rank 0's
    assert end == straight[0]
    assert not list(kills.iterdir())
    assert len(events(run, "workers_failed")) == 1
    assert {one["step"] for one in events(run, "step")} == set(range(1, STEPS + 1))
    assert not events(run, "program_step")
    assert steps_saved(run)[-1] == STEPS


def test_what_a_run_leaves(two_ranks: Ranks, tmp_path: Path) -> None:
    """Events and checkpoints are those of every session; copies that outlast a step's forward are waited for."""
    run = tmp_path / "run"
    two_ranks.run(wide, str(run))
    assert [info.step for info in list_steps(run / "checkpoints") if info.status == "committed"] == [2, 4, 5]
    records = list(read_events(run / "attempts" / "0001" / "events" / "rank_00000.jsonl"))
    steps = [one for one in records if one.kind == "step"]
    assert [one["step"] for one in steps] == [1, 2, 3, 4, 5]
    assert all(0 < one["wire_bytes"] < one["dense_bytes"] / 4 for one in steps[1:])
    assert [one["lr"] for one in steps] == [0.05] * 5
    (began,) = [one for one in records if one.kind == "run_started"]
    assert began["parameters"] == 1_061_889
    assert "topk" in began["comm"]
    assert [one["step"] for one in records if one.kind == "checkpoint_saved"] == [2, 4, 5]


def wide(rank: int, run: str) -> None:
    """What is to be copied is many times what the copies may take, so most of it waits for what is written."""
    net = network(1024)
    settings = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}
    settings |= {"zero_allow_untested_optimizer": True, "steps_per_print": 1_000_000}
    engine = import_module("deepspeed").initialize(
        model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.05), config=settings
    )[0]
    comm = {"target": "update", "density": 0.01, "warmup_steps": 1}
    checkpoint = {"every_steps": 2, "host_memory_mb": 4, "chunk_mb": 1}
    with outlast.Session(run, engine, comm=comm, checkpoint=checkpoint, notice_grace_s=None) as session:
        draws = Draws(rank)
        for _ in session.steps(5):
            x, y = next(draws)
            engine.backward(nn.functional.mse_loss(engine(x), y))
            engine.step()


def test_several_engines(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(two_engines, str(tmp_path / "run"), 0) == two_ranks.run(two_engines, str(tmp_path / "cut"), 3)


def two_engines(rank: int, run: str, stop: int) -> list[str]:
    """Of different ZeRO stages, and a bare model beside them."""

    def once(stop: int) -> list[str]:
        engines = {"net": engine_of(0), "net_2": engine_of(1), "bare": network(8)}
        optimizer = {"bare": torch.optim.AdamW(engines["bare"].parameters(), lr=1e-2)}
        settings: dict[str, Any] = {"comm": False, "checkpoint": {"every_steps": 2}, "notice_grace_s": None}
        with outlast.Session(run, engines, optimizer, **settings) as session:
            torch.manual_seed(rank)
            draws = Draws(rank)
            session.add(draws=draws)
            for step in session.steps(5):
                x, y = next(draws)
                for name in ("net", "net_2"):
                    engines[name].backward(nn.functional.mse_loss(engines[name](x), y))
                    engines[name].step()
                session.model["bare"](x).square().mean().backward()
                optimizer["bare"].step()
                optimizer["bare"].zero_grad()
                if step == stop:
                    break
        return [weights(engines["net"]), weights(engines["net_2"]), digest(engines["bare"])]

    ends = once(stop)
    return once(0) if stop else ends


def test_what_cannot_be_done_is_named(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(refusals, str(tmp_path))
    assert [info.step for info in list_steps(tmp_path / "zero2" / "checkpoints")] == [2], "nothing is lost"


def refusals(rank: int, folder: str) -> None:
    def says(error: type[OutlastError], text: str, fix: str, call: Any, *args: Any, **settings: Any) -> None:
        with pytest.raises(error) as caught:
            call(*args, **settings)
        assert text in caught.value.what, caught.value
        assert fix in caught.value.fix, caught.value

    own, saved = f"{folder}/a", f"{folder}/zero2"
    says(CommError, "ZeRO stage 3", "comm=False", train, own, 2, 3)
    assert not os.path.exists(f"{own}/checkpoints")
    engine = engine_of(2)
    says(
        SessionError, "has an optimizer inside", "Session(run, engine)", outlast.Session, own, engine, engine.optimizer
    )
    with outlast.checkpoint.deepspeed.attach(engine):
        says(CheckpointError, "DeepSpeedCheckpointEngine", "attach once", outlast.Session, own, engine)
    says(SessionError, "step 1 has ended after 1 of 2 micro-batches", "in one turn", micro_batches, own)
    with outlast.Session(own, engine, notice_grace_s=None):  # what was refused has given everything back
        says(CheckpointError, "engine.save_checkpoint()", "session.save()", engine.save_checkpoint, own)
        says(CheckpointError, "engine.load_checkpoint()", "session.resume()", engine.load_checkpoint, own)
    assert "outlast" not in type(engine.checkpoint_engine).__module__
    train(saved, 2, 2)
    says(StateMismatch, "saved with ZeRO 2, and the engine has ZeRO 1", "stage = 2", train, saved, 4, 1)
    ddp = {"checkpoint": {"every_steps": 2}, "notice_grace_s": None}
    says(StateMismatch, "the state of a DeepSpeed engine", "deepspeed.initialize", resumed, saved, network(), **ddp)
    with outlast.Session(f"{folder}/ddp", network(), **ddp) as session:
        for _ in session.steps(1):
            pass
    says(StateMismatch, "not saved under DeepSpeed", "DDP or FSDP2", train, f"{folder}/ddp", 4, 2)


def test_deepspeed_alone_opens_it(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(opens, str(tmp_path / "run"))
    assert [path.name for path in sorted((tmp_path / "run" / "new" / "folder").iterdir())] == ["step_00000004"]


def opens(rank: int, run: str) -> None:
    """With outlast as its checkpoint engine, which saves to a folder that is not there yet."""
    train(run, 3, 2)
    engine = engine_of(2)
    with outlast.checkpoint.deepspeed.attach(engine):
        engine.load_checkpoint(f"{run}/checkpoints")
        assert engine.global_steps == 3
        engine.backward(engine(torch.ones(16, 8)).square().mean())
        engine.step()
        engine.save_checkpoint(f"{run}/new/folder")


def resumed(run: str, model: nn.Module, **settings: Any) -> None:
    with outlast.Session(run, model, **settings) as session:
        session.resume()


def micro_batches(run: str) -> None:
    """A loop with a turn for each micro-batch, as DeepSpeed's own loops are."""
    engine = engine_of(2, 2)
    with outlast.Session(run, engine, checkpoint={"every_steps": 1}, notice_grace_s=None) as session:
        for _ in session.steps(4):
            engine.backward(engine(torch.ones(16, 8)).square().mean())
            engine.step()
