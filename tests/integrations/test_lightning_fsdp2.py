"""Lightning's Trainer in a session with FSDP2, on two ranks: it goes on bit for bit; tensor parallelism is refused."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.errors import OutlastError
from outlast.launch.failures import RESUME_STATUS
from tests.comm.ranks import Ranks
from tests.helpers import events, steps_saved
from tests.integrations.hf_training import as_launched
from tests.session.program import digest

pytest.importorskip("lightning", reason="lightning is not installed: pip install 'outlast[lightning]'")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def fit(
    rank: int,
    folder: str,
    run: str = "",
    shares: int = 2,
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
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    as_launched(rank, folder)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    dies = Dies(kills, notice_at)
    comm = settings.pop("comm", None)
    session = [SessionCallback(run, comm=comm, checkpoint={"every_steps": 1, "keep_last": 3})] if run else []
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=shares, tensor_parallel_size=2 // shares),
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
    return {"weights": digest(net), "seen": net.seen, "validations": dies.validations, "step": trainer.global_step}


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
