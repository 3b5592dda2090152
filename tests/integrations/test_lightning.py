"""Lightning's Trainer in a session, on one rank: it goes on bit for bit, and what it cannot do is refused."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning", reason="lightning is not installed: pip install 'outlast[lightning]'")

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from outlast.checkpoint import load
from outlast.checkpoint.save.snapshot import Snapshot
from outlast.checkpoint.tools import list_steps, verify
from outlast.errors import SessionError, StateMismatch
from outlast.integrations.lightning import SessionCallback
from outlast.integrations.lightning_limits import refuse
from outlast.launch.runner import RUN_DIR
from tests.integrations.lightning_program import Dies, Net, data, loader
from tests.session.program import digest

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's and torchdata's own
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, and few words."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "TORCHELASTIC_RUN_ID", RUN_DIR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


class Source(LightningDataModule):
    """With a state of its own."""

    def __init__(self, train: Any) -> None:
        super().__init__()
        self.train, self.asked = train, 0

    def train_dataloader(self) -> Any:
        self.asked += 1
        return self.train

    def val_dataloader(self) -> Any:
        return loader(2, 32, ordered=True)

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = 10 + state["asked"]


def shuffled() -> Any:
    """Whose order comes from torch's random numbers."""
    return DataLoader(data(1, 16 * 5), batch_size=16, shuffle=True)


def with_generator() -> Any:
    return loader(1, 16 * 5)


def stateful() -> Any:
    return StatefulDataLoader(data(1, 16 * 5), batch_size=16, shuffle=True)


class Endless(IterableDataset[Any]):
    """Without a length."""

    def __iter__(self) -> Any:
        yield from data(1, 16 * 5)


def stream() -> Any:
    return StatefulDataLoader(Endless(), batch_size=16)


def trained(
    run: Path | None, train: Any = shuffled, *, resume: Any = "auto", seed: int = 0, more: Any = (), **settings: Any
) -> tuple[object, ...]:
    """How it ends: weights and buffers, what it saw, its validations, and the steps."""
    torch.manual_seed(seed)
    dies, net = Dies(None), Net()
    callbacks: list[Callback] = [dies, *more]
    if run is not None:
        callbacks.append(SessionCallback(run, resume=resume, checkpoint={"every_steps": 1, "keep_last": 0}))
    settings = {"max_epochs": 2, "val_check_interval": 3, "enable_checkpointing": run is not None} | settings
    plugins = [LightningEnvironment()]
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=callbacks, plugins=plugins, **QUIET, **settings)
    trainer.fit(net, Source(train()))
    return digest(net), net.seen, dies.validations, trainer.global_step


def goes_on(tmp_path: Path, steps: list[int], train: Any = shuffled, **settings: Any) -> None:
    """From each of these steps it ends as a straight run; another seed, as if nobody had set one."""
    more = settings.pop("more", tuple)
    run = tmp_path / "run"
    straight = trained(run, train, more=more(), **settings)
    for step in steps:
        shutil.copytree(run, tmp_path / "again", symlinks=True)
        assert trained(tmp_path / "again", train, resume=step, seed=step, more=more(), **settings) == straight, step
        shutil.rmtree(tmp_path / "again")


def test_it_goes_on_from_any_step(tmp_path: Path) -> None:
    """Inside the first epoch; with a validation; at the end of an epoch; in the next; at the end."""
    goes_on(tmp_path, [2, 3, 5, 7, 10])


def test_lightning_is_deterministic_and_a_session_changes_nothing(tmp_path: Path) -> None:
    assert trained(None) == trained(None) == trained(tmp_path / "run")


@pytest.mark.parametrize(
    ("train", "step"),
    [(with_generator, 7), (stateful, 7), (stateful, 5), (stream, 7)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_with_whatever_loader(tmp_path: Path, train: Any, step: int) -> None:
    end = {"max_epochs": -1, "max_steps": 9} if train is stream else {}
    goes_on(tmp_path, [step], train, **end)


def average() -> list[Callback]:
    return [WeightAveraging(avg_fn=get_ema_avg_fn(0.9))]


def test_accumulation_and_what_callbacks_have(tmp_path: Path) -> None:
    """Averaged weights are in what that callback adds to Lightning's checkpoints."""
    goes_on(tmp_path, [2], accumulate_grad_batches=2, more=average)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2, "max_epochs": 1}, {"max_steps": 4}])
def test_averages_take_the_weights_place_when_they_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]
) -> None:
    """In a validation after a batch without an update, and where training ends inside an epoch."""

    class Slow(Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, *batch: Any) -> None:
            time.sleep(0.2)

    copy = Snapshot.copy

    def slowly(self: Snapshot, *args: Any, **more: Any) -> Any:
        time.sleep(0.05)
        return copy(self, *args, **more)

    monkeypatch.setattr(Snapshot, "copy", slowly)
    trained(tmp_path / "run", more=[*average(), Slow()], **settings)
    place = tmp_path / "run" / "checkpoints"
    assert all(verify(place, one.step).ok for one in list_steps(place))


def test_stopped_early_it_ends(tmp_path: Path) -> None:
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    assert trained(tmp_path / "run", more=[stop])[3] == 8
    assert [one.step for one in list_steps(tmp_path / "run" / "checkpoints")][-1] == 8


def test_an_error_is_the_programs_own(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
            if trainer.global_step == 4:
                raise ValueError("a batch that cannot be read")

    with pytest.raises(ValueError, match="a batch that cannot be read"):
        trained(tmp_path / "run", more=[Breaks()])
    straight = trained(tmp_path / "straight")
    assert trained(tmp_path / "run", seed=5) == straight


def test_more_epochs_later(tmp_path: Path) -> None:
    trained(tmp_path / "run", max_epochs=1)
    assert trained(tmp_path / "run", seed=1, max_epochs=2) == trained(tmp_path / "straight", max_epochs=2)
    with pytest.raises(StateMismatch, match="the checkpoint is of step 10, but the loop ends at step 5"):
        trained(tmp_path / "run", max_epochs=1)


class Two(Net):
    """Several optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.parameters()), torch.optim.AdamW(self.parameters())]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"callbacks": [SessionCallback()]}, "several SessionCallbacks"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder, whose trial steps"),
        ({"callbacks": [StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging, which replaces"),
        ({"net": Two}, "configure_optimizers gave 2 optimizers"),
        ({"ckpt_path": "there.ckpt"}, "fit\\(ckpt_path='there[.]ckpt'\\)"),
        ({"train": stream, "max_epochs": -1, "val_check_interval": 1.0}, "neither the data nor the Trainer has an end"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_refused_before_anything_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    given = dict(settings)
    net, train, path = given.pop("net", Net)(), given.pop("train", shuffled)(), given.pop("ckpt_path", None)
    if path:
        monkeypatch.chdir(tmp_path)
        saver = Trainer(accelerator="cpu", devices=1, plugins=[LightningEnvironment()], **QUIET)
        saver.strategy.connect(net)
        saver.save_checkpoint(path)
    callbacks = [*given.pop("callbacks", []), SessionCallback(tmp_path / "run")]
    trainer = Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "devices": 1, **QUIET, **given},
        callbacks=callbacks,
        plugins=[LightningEnvironment()],
    )
    try:
        with pytest.raises(SessionError, match=said):
            trainer.fit(net, Source(train), ckpt_path=path)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # Lightning leaves its strategy's
    assert not (tmp_path / "run").exists()


def test_forked_processes_are_refused() -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(start_method="fork"),
        plugins=[LightningEnvironment()],
        **QUIET,
    )
    with pytest.raises(SessionError, match="processes that are made by fork"):
        refuse(trainer)


def test_fsdp_of_version_1_is_refused() -> None:
    """Lightning has it on GPUs alone, so here it takes the other strategy's place."""
    trainer = Trainer(accelerator="cpu", devices=1, plugins=[LightningEnvironment()], **QUIET)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(SessionError, match="under FSDPStrategy") as said:
        refuse(trainer)
    assert "ModelParallelStrategy with fully_shard" in str(said.value)


def test_it_is_the_last_callback_wherever_it_stands(tmp_path: Path) -> None:
    """Lightning puts what saves at the end, so that a ModelCheckpoint comes after it, whose state would be missed."""
    saver = ModelCheckpoint(tmp_path / "files", monitor="val_loss", every_n_epochs=1)
    more = [SessionCallback(tmp_path / "run", checkpoint={"every_steps": 1}), saver]
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=more, plugins=[LightningEnvironment()], max_epochs=2, **QUIET
    )
    trainer.fit(Net(), Source(shuffled()))
    assert trainer.callbacks[-1] is more[0]
    kept = load(tmp_path / "run" / "checkpoints", "newest").local["own_parts"]["lightning"]["callbacks"]
    assert kept[saver.state_key]["best_model_path"] == saver.best_model_path != ""
