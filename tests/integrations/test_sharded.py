"""Hugging Face's Trainer and Accelerate in a session where ranks hold parts of the model: FSDP2, and DeepSpeed's ZeRO.

Stopped or killed they go on bit for bit, compressed where that is possible; what cannot be is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.tools import list_steps
from outlast.errors import SessionError
from outlast.launch.failures import RESUME_STATUS
from tests.comm.ranks import Ranks
from tests.helpers import events
from tests.integrations import accelerate_training, cpu_ranks, hf_training
from tests.integrations.accelerate_training import Loop
from tests.integrations.hf_training import Plan

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
OFTEN = {"every_steps": 2}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A Trainer's settings."""
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }
    return {"deepspeed": settings, "use_cpu": False, "gradient_accumulation_steps": 2}


WARMUP = {"type": "WarmupLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")}


@pytest.fixture(scope="module")
def fsdp_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, prepare=cpu_ranks.shard)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def zero_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, prepare=cpu_ranks.deepspeed)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """As Accelerate takes them: without accelerators there is DDP alone."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def run(ranks: Ranks, function: Callable[..., Any], folder: Path, plan: Any) -> list[Any]:
    folder.mkdir(exist_ok=True)
    return ranks.run(function, str(folder), plan)


def trained(ranks: Ranks, folder: Path, plan: Plan) -> dict[str, Any]:
    """A Trainer's end, which is the same on both ranks, without the steps that it took to it."""
    one, other = run(ranks, hf_training.train, folder, plan)
    assert one == other
    return {name: value for name, value in one.items() if name != "steps"}


def looped(ranks: Ranks, folder: Path, plan: Loop) -> list[Any]:
    return run(ranks, accelerate_training.loop, folder, plan)


def saved(folder: Path) -> list[int]:
    return [info.step for info in list_steps(folder / "run" / "checkpoints") if info.status == "committed"]


def is_compressed(folder: Path) -> bool:
    steps = [one for one in events(folder / "run", "step") if one.rank == 0]
    return 0 < sum(one["wire_bytes"] for one in steps) < sum(one["dense_bytes"] for one in steps)


def test_a_trainer_with_fsdp2(fsdp_ranks: Ranks, tmp_path: Path) -> None:
    """Ended by a notice inside an epoch it goes on as a straight run. The Trainer's AdamW is fused."""
    plan = Plan(8, FSDP2 | {"max_grad_norm": 0.0}, OFTEN)
    straight = trained(fsdp_ranks, tmp_path / "straight", plan)
    folder = tmp_path / "run"
    assert trained(fsdp_ranks, folder, replace(plan, notice_at=5)) == {"status": RESUME_STATUS, "step": 6}
    assert trained(fsdp_ranks, folder, plan) == straight
    assert is_compressed(folder)


def test_a_loop_with_fsdp2(fsdp_ranks: Ranks, tmp_path: Path) -> None:
    """Stopped inside an epoch, whose order was drawn; without compression a session changes nothing."""
    plan = Loop(8, sharding="fsdp2")
    straight = looped(fsdp_ranks, tmp_path / "straight", plan)
    folder = tmp_path / "run"
    looped(fsdp_ranks, folder, replace(plan, stop_at=3))
    assert saved(folder) == [3]
    assert looped(fsdp_ranks, folder, plan) == straight
    assert is_compressed(folder)
    dense = looped(fsdp_ranks, tmp_path / "dense", replace(plan, comm=False))
    assert dense == looped(fsdp_ranks, tmp_path / "plain", replace(plan, plain=True))


def goes_on_when_killed(run: Callable[..., Any], ranks: Ranks, tmp_path: Path, plan: Plan | Loop, at: int) -> None:
    """A rank is killed in a step, and the run ends as one that nobody has interrupted."""
    straight = run(ranks, tmp_path / "straight", plan)
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match="SIGKILL"):
        run(ranks, folder, replace(plan, kill_at=at))
    assert 0 < saved(folder)[-1] < at
    assert run(ranks, folder, plan) == straight
    assert is_compressed(folder) == (plan.comm is not False)


@pytest.mark.soak
@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["gradients", "updates"])
def test_a_trainer_with_fsdp2_is_killed(fsdp_ranks: Ranks, tmp_path: Path, clip: float) -> None:
    """With evaluation and accumulation."""
    settings = {"eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": clip}
    goes_on_when_killed(trained, fsdp_ranks, tmp_path, Plan(12, FSDP2 | settings, OFTEN), at=9)


@pytest.mark.soak
@needs_deepspeed
@pytest.mark.parametrize(
    ("settings", "comm"),
    [
        pytest.param(zero(0), None, id="zero0"),
        pytest.param(zero(1), None, id="zero1"),
        pytest.param(zero(2, scheduler=WARMUP) | {"max_grad_norm": 0.0}, None, id="zero2"),
        pytest.param(zero(3), False, id="zero3"),
    ],
)
def test_a_trainer_with_deepspeed_is_killed(
    zero_ranks: Ranks, tmp_path: Path, settings: dict[str, Any], comm: Any
) -> None:
    goes_on_when_killed(trained, zero_ranks, tmp_path, Plan(12, settings, OFTEN, comm=comm), at=9)


def learns_as_dense_does(ranks: Ranks, tmp_path: Path, settings: dict[str, Any]) -> None:
    rate = {"learning_rate": 6e-3, "per_device_train_batch_size": 8}
    dense = trained(ranks, tmp_path / "dense", Plan(100, settings | rate, plain=True))
    assert dense["loss"] < 0.3 * dense["history"][0]["loss"]
    assert trained(ranks, tmp_path / "run", Plan(100, settings | rate, comm={"density": 0.1}))["loss"] < (
        1.02 * dense["loss"]
    )
    assert is_compressed(tmp_path / "run")


@pytest.mark.soak
@pytest.mark.parametrize("clip", [1.0, 0.0], ids=["gradients", "updates"])
def test_a_trainer_with_fsdp2_learns(fsdp_ranks: Ranks, tmp_path: Path, clip: float) -> None:
    learns_as_dense_does(fsdp_ranks, tmp_path, FSDP2 | {"max_grad_norm": clip})


@pytest.mark.soak
@needs_deepspeed
def test_a_trainer_with_zero_2_learns(zero_ranks: Ranks, tmp_path: Path) -> None:
    learns_as_dense_does(zero_ranks, tmp_path, zero(2) | {"gradient_accumulation_steps": 1})


def goes_on_after_the_step_before(ranks: Ranks, tmp_path: Path, plan: Plan) -> None:
    straight = trained(ranks, tmp_path / "straight", plan)
    folder = tmp_path / "run"
    trained(ranks, folder, replace(plan, notice_at=5))
    step = folder / "run" / "checkpoints" / "step_00000006"
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    end = run(ranks, hf_training.train, folder, plan)[0]
    assert end.pop("steps") == [5, 6, 7, 8]
    assert end == straight


@pytest.mark.soak
def test_a_damaged_step_of_fsdp2(fsdp_ranks: Ranks, tmp_path: Path) -> None:
    """The Trainer was told of it before, and has wrapped its model by the time that the damage is found."""
    goes_on_after_the_step_before(fsdp_ranks, tmp_path, Plan(8, FSDP2, OFTEN))


@pytest.mark.soak
@needs_deepspeed
def test_a_damaged_step_of_deepspeed(zero_ranks: Ranks, tmp_path: Path) -> None:
    goes_on_after_the_step_before(zero_ranks, tmp_path, Plan(8, zero(2), OFTEN))


@pytest.mark.soak
def test_a_loop_with_fsdp2_is_killed(fsdp_ranks: Ranks, tmp_path: Path) -> None:
    clipped = {"target": "gradient", "feedback": "ef21", "density": 0.2}
    goes_on_when_killed(looped, fsdp_ranks, tmp_path, Loop(18, clip=True, comm=clipped, sharding="fsdp2"), at=14)


@pytest.mark.soak
@needs_deepspeed
@pytest.mark.parametrize(("stage", "comm"), [(0, None), (1, None), (2, None), (3, False)])
def test_a_loop_with_deepspeed_is_killed(zero_ranks: Ranks, tmp_path: Path, stage: int, comm: Any) -> None:
    goes_on_when_killed(looped, zero_ranks, tmp_path, Loop(18, comm=comm, sharding=f"zero{stage}"), at=14)


def said(ranks: Ranks, folder: Path, plan: Plan) -> str:
    (line,) = {line for lines in run(ranks, hf_training.said, folder, plan) for line in lines if "Error: " in line}
    return str(line)


def refused(rank: int, folder: str, sharding: str) -> str:
    """What is said of an Accelerator."""
    from accelerate import Accelerator

    from outlast.integrations.accelerate import AcceleratedSession

    hf_training.as_launched(rank, folder)
    accelerator = Accelerator(**accelerate_training.sharding_of(Loop(sharding=sharding)))
    with pytest.raises(SessionError) as error:
        AcceleratedSession(accelerator, "run", torch.nn.Linear(2, 1))
    return str(error.value)


def test_fsdp_of_version_1_is_refused(fsdp_ranks: Ranks, tmp_path: Path) -> None:
    version_1 = {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}}
    trainer = said(fsdp_ranks, tmp_path, Plan(settings=version_1))
    (loop,) = set(fsdp_ranks.run(refused, str(tmp_path), "fsdp1"))
    for error in (trainer, loop):
        assert "uses FSDP of version 1" in error
        assert "fsdp_version=2" in error
    assert not (tmp_path / "run").exists(), "before anything begins"


def test_ddp_in_place_of_what_was_asked_for_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    """On CPUs Accelerate drops FSDP without a word."""
    trainer = said(two_ranks, tmp_path, Plan(settings=FSDP2))
    assert "the Trainer was asked for FSDP, and Accelerate has made MULTI_CPU of it" in trainer
    (loop,) = set(two_ranks.run(refused, str(tmp_path), "fsdp2"))
    assert "the accelerator was asked for FSDP, and Accelerate has made MULTI_CPU of it" in loop
    assert not (tmp_path / "run").exists()


@pytest.mark.soak
@needs_deepspeed
def test_zero_3_cannot_compress(zero_ranks: Ranks, tmp_path: Path) -> None:
    trainer = said(zero_ranks, tmp_path, Plan(settings=zero(3)))
    (loop,) = {end["error"] for end in looped(zero_ranks, tmp_path, Loop(sharding="zero3"))}
    for error in (trainer, loop):
        assert "gradients cannot be compressed with DeepSpeed's ZeRO stage 3" in error
        assert "comm=False" in error
    assert not saved(tmp_path)
