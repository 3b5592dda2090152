"""DeepSpeed, ZeRO 0 to 3, with its own JSON; the checkpoint is outlast's."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.checkpoint import Restored
from outlast.checkpoint.deepspeed.state import DeepSpeedState
from outlast.comm import CollectiveObserver, Reducer, attach
from outlast.deepspeed_compat import import_deepspeed
from outlast.errors import ConfigError, TrainingDiverged
from outlast.session.scheduled_checkpoints import Collected
from outlast.trainer.batches import Batch, to_device
from outlast.trainer.config import Config
from outlast.trainer.engines.base import EAGER, UNMEASURED, UpdateStats
from outlast.trainer.engines.training import adam_direction, load_comm, recorded
from outlast.trainer.optim import load_scheduler_state, scheduler_state
from outlast.trainer.parts import build_loss, make_optimizer, make_scheduler


class DeepSpeedEngine:
    """What ``deepspeed.initialize`` makes of the model, with outlast's reducer where gradients are compressed.

    Args:
        model: on its device, with the same weights on every rank.
        config: all settings.
        device: where ``model`` is.
        observer: records every exchange of gradients that outlast makes, and each forward and backward as a whole.

    Raises:
        MissingDependency: deepspeed is not installed.
        ConfigError: the JSON cannot be read, contradicts other settings, or DeepSpeed refuses it.
        CommError, CheckpointError: what ``[comm]`` asks for, or a checkpoint, cannot be done with this JSON.
    """

    def __init__(
        self, model: nn.Module, config: Config, device: torch.device, observer: CollectiveObserver | None = None
    ) -> None:
        self.model = model
        self.device = device
        self._observer = observer
        self._averages_updates = config.comm.target == "update"
        settings = read_settings(config)
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # which srun and mpirun do not set
        for old in ("reduce_scatter_tensor", "all_gather_into_tensor"):  # DeepSpeed's own calls, at each step
            warnings.filterwarnings("ignore", f".*{old}. is deprecated", FutureWarning)
        (deepspeed,) = import_deepspeed()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        own = None if "optimizer" in settings else make_optimizer(model, config)
        try:
            self._engine, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=own,
                model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
                config=settings,
                dist_init_required=False,
            )
        except (AssertionError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"DeepSpeed refuses {config.deepspeed.config}: {error}") from error
        self._state = DeepSpeedState(self._engine)
        self._reducer: Reducer | None = None
        if config.comm.compressor != "dense" or self._averages_updates:
            direction = adam_direction(config) if self._averages_updates else None
            self._reducer = attach(self._engine, config.comm, observer=observer, direction=direction)
        basic = self._engine.basic_optimizer
        self._scheduler = None
        if "scheduler" not in settings and isinstance(basic, Optimizer):
            self._scheduler = make_scheduler(basic, config)
        self._loss_of = build_loss(config)

    @property
    def optimizer(self) -> None:
        """See :class:`Engine`."""

    def forward_backward(self, step: int, batches: Sequence[Batch]) -> float:
        """See :class:`Engine`; the last micro-batch's backward reduces gradients, in ZeRO 2 and 3 each does."""
        if self._reducer is not None:
            self._reducer.begin_step(step)
        total = torch.zeros((), device=self.device)
        with recorded(self._observer, "deepspeed"):
            for index, batch in enumerate(batches, 1):
                loss = self._loss(batch)
                self._engine.backward(loss)
                if index < len(batches):
                    self._engine.step()  # counts the micro-batch
                total += loss.detach() / len(batches)
        return float(total)

    def update(self, step: int) -> UpdateStats:
        """See :class:`Engine`. Collective.

        Raises:
            TrainingDiverged: the gradients' norm was NaN or infinite; DeepSpeed has made the update with it.
        """
        lr = float(self._engine.get_lr()[0])
        self._engine.step()
        if self._scheduler is not None:
            self._scheduler.step()
        reduced = UNMEASURED if self._reducer is None else self._reducer.end_step()
        found = self._engine.get_global_grad_norm()
        norm = None if found is None else float(found)
        if norm is not None and not math.isfinite(norm) and not self._engine.fp16_enabled():
            raise TrainingDiverged(
                f"step {step}: the gradient norm is {norm}, and DeepSpeed has updated the parameters with it",
                "lower optim.lr, lengthen optim.warmup_steps, or resume from an earlier step with --resume STEP",
            )
        return UpdateStats.of(norm, lr, reduced, of_updates=self._averages_updates)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """See :class:`Engine`. Collective for each batch with ZeRO 3."""
        self._engine.eval()
        losses = torch.stack([self._loss(batch).float() for batch in batches])
        self._engine.train()
        return losses.mean()

    def state(self) -> Collected:
        """See :class:`Engine`: DeepSpeed's files, each of the rank that would write it. Collective."""
        replicated, local = self._state.collect()
        replicated["ranks"] = dist.get_world_size()
        if self._scheduler is not None:
            replicated["scheduler"] = scheduler_state(self._scheduler)
        if self._reducer is not None:
            comm = self._reducer.checkpoint_parts()
            replicated |= comm.replicated
            local |= comm.local
        return Collected(replicated, local, EAGER | DeepSpeedState.EAGER)

    def like(self) -> None:
        """See :class:`Engine`: DeepSpeed's files are each rank's own."""

    def load(self, restored: Restored) -> None:
        """See :class:`Engine`. State of ZeRO 1 to 3 stays with its number of ranks."""
        replicated, ranks = restored.replicated, restored.world_size
        self._state.check(replicated, ranks)
        load_comm(self._reducer, restored)
        self._state.load(replicated, restored.read_local, ranks)
        if self._scheduler is not None and "scheduler" in replicated:
            load_scheduler_state(self._scheduler, replicated["scheduler"])

    def close(self) -> None:
        """See :class:`Engine`."""
        if self._reducer is not None:
            self._reducer.close()
        self._state.close()

    def _loss(self, batch: Batch) -> Tensor:
        return self._loss_of(self._engine, to_device(batch, self.device))


def read_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON, with what it leaves out taken from the other settings.

    Raises:
        ConfigError: it cannot be read, or says something else than they do.
    """
    assert config.deepspeed.config is not None
    path = Path(config.deepspeed.config)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed.config = {str(path)!r} cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"deepspeed.config = {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"deepspeed.config = {str(path)!r} holds a {type(settings).__name__}, not an object")
    optim = config.optim
    same = {
        "train_micro_batch_size_per_gpu": ("data.batch_size", config.data.batch_size, True),
        "gradient_accumulation_steps": ("trainer.accumulate", config.trainer.accumulate, True),
        "gradient_clipping": ("optim.clip_norm", config.clip_norm, optim.clip_norm is not None),
    }
    for key, (name, value, binding) in same.items():
        if settings.get(key, "auto") == "auto":
            settings[key] = value
        elif binding and settings[key] != value:
            raise ConfigError(
                f"{path} has {key} = {settings[key]}, and {name} is {value}",
                f"leave {key} out of the JSON, or set {name} to the same",
            )
    for key, name, given in (
        ("optimizer", "optim.factory", optim.factory),
        ("scheduler", "optim.scheduler", optim.scheduler),
    ):
        if key in settings and given is not None:
            raise ConfigError(f"{path} has a {key}, and {name} = {given!r} names another", "leave one of them out")
    settings.setdefault("steps_per_print", 2**31 - 1)
    if "optimizer" not in settings:
        settings.setdefault("zero_allow_untested_optimizer", True)
    return settings
