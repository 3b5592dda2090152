"""Lightning's Trainer in a session with FSDP2 and DeepSpeed, on two ranks: it goes on bit for bit, or is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.errors import OutlastError
from outlast.launch.failures import RESUME_STATUS
from tests.comm.deepspeed.test_deepspeed import load as load_deepspeed
from tests.comm.ranks import Ranks
from tests.helpers import events, steps_saved
from tests.integrations.hf_training import as_launched
from tests.session.program import digest

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
pytest.importorskip("lightning", reason="lightning is not installed: pip install 'outlast[lightning]'")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def zero_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, prepare=load_deepspeed)
    yield ranks
    ranks.close()


def fit(
    rank: int,
    folder: str,
    run: str = "",
    shares: int = 2,
    stage: int | None = None,
    notice_at: int = 0,
    kills: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train; what became of it on this rank. Without a run it is Lightning alone; ``comm`` is the session's."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from outlast.integrations.lightning import SessionCallback
    from tests.integrations.lightning_program import Dies, Net, loader

    class Sharded(Net):
        def configure_model(self) -> None:
            if stage is not None:
                return
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    as_launched(rank, folder)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    dies = Dies(kills, notice_at)
    comm = settings.pop("comm", None)
    session = [SessionCallback(run, comm=comm, checkpoint={"every_steps": 1, "keep_last": 3})] if run else []
    fsdp2 = ModelParallelStrategy(data_parallel_size=shares, tensor_parallel_size=2 // shares)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=fsdp2 if stage is None else zero(stage),
        plugins=[TorchElasticEnvironment()],
        callbacks=[*session, dies],
        logger=False,
        enable_checkpointing=bool(run),
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        val_check_interval=4,
        **settings,
    )
    net = Sharded()
    try:
        trainer.fit(net, loader(1, 16 * 6 * 2), loader(2, 64, ordered=True))
    except SystemExit as end:
        return {"status": end.code}
    except OutlastError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    gathered: Any = nullcontext()
    if stage == 3:
        gathered = import_module("deepspeed").zero.GatheredParameters(list(net.parameters()))
    with gathered:
        weights = digest(net)
    return {"weights": weights, "seen": net.seen, "validations": dies.validations, "step": trainer.global_step}


def on_cpus() -> None:
    """Lightning has DeepSpeed on GPUs alone; with this it has it here, in the same way."""
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    DeepSpeedStrategy.setup_environment = DDPStrategy.setup_environment
    DeepSpeedStrategy.setup_distributed = DeepSpeedStrategy.set_world_ranks
    DeepSpeedStrategy.root_device = property(lambda self: torch.device("cpu", 0))


def zero(stage: int) -> Any:
    """The strategy."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    on_cpus()
    settings = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return DeepSpeedStrategy(config=settings)


def fitted(ranks: Ranks, folder: Path, *, shares: int = 2, notice_at: int = 0, **settings: Any) -> list[Any]:
    folder.mkdir(exist_ok=True)
    return ranks.run(_fit, str(folder), {"shares": shares, "notice_at": notice_at, **settings})


def _fit(rank: int, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    return fit(rank, folder, **settings)


def test_it_goes_on_bit_for_bit(two_ranks: Ranks, tmp_path: Path) -> None:
    """A notice comes inside the second epoch. Without compression a session changes nothing."""
    straight = fitted(two_ranks, tmp_path, run="straight")
    assert fitted(two_ranks, tmp_path, run="run", notice_at=8) == [{"status": RESUME_STATUS}] * 2
    assert steps_saved(tmp_path / "run")[-1] == 9
    assert fitted(two_ranks, tmp_path, run="run") == straight
    steps = [one for one in events(tmp_path / "run", "step") if one.rank == 0]
    assert 0 < sum(one["wire_bytes"] for one in steps) < sum(one["dense_bytes"] for one in steps)
    assert fitted(two_ranks, tmp_path, run="dense", comm=False) == fitted(two_ranks, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}, {"comm": False}])
def test_killed_it_goes_on(two_ranks: Ranks, tmp_path: Path, settings: dict[str, Any]) -> None:
    is_killed(two_ranks, tmp_path, settings)


@pytest.mark.soak
@needs_deepspeed
@pytest.mark.parametrize(
    "settings",
    [
        {"stage": 0},
        {"stage": 1, "gradient_clip_val": 0.5},
        {"stage": 2, "accumulate_grad_batches": 2},
        {"stage": 3, "comm": False},
    ],
    ids=lambda settings: f"zero{settings['stage']}",
)
def test_killed_with_deepspeed_it_goes_on(zero_ranks: Ranks, tmp_path: Path, settings: dict[str, Any]) -> None:
    is_killed(zero_ranks, tmp_path, settings)


@pytest.mark.soak
@needs_deepspeed
def test_zero_3_cannot_compress(zero_ranks: Ranks, tmp_path: Path) -> None:
    (said,) = {end["error"] for end in fitted(zero_ranks, tmp_path, run="run", stage=3)}
    assert "gradients cannot be compressed with DeepSpeed's ZeRO stage 3" in said
    assert "comm=False" in said


def is_killed(two_ranks: Ranks, tmp_path: Path, settings: dict[str, Any]) -> None:
    straight = fitted(two_ranks, tmp_path, run="straight", **settings)
    kills = tmp_path / "kills"
    kills.mkdir()
    step = 5 if "accumulate_grad_batches" in settings else 8
    (kills / f"{step}-1").touch()
    with pytest.raises(AssertionError, match="SIGKILL"):
        fitted(two_ranks, tmp_path, run="run", kills=kills, **settings)
    assert 0 < steps_saved(tmp_path / "run")[-1] <= step
    assert fitted(two_ranks, tmp_path, run="run", **settings) == straight


def test_tensor_parallelism_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    (said,) = {end["error"] for end in fitted(two_ranks, tmp_path, run="run", shares=1)}
    assert "ModelParallelStrategy with tensor_parallel_size = 2" in said
    assert "data_parallel_size=2, tensor_parallel_size=1" in said
    assert not (tmp_path / "run").exists()
