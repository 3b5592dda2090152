"""PyTorch's DistributedDataParallel: the model is replicated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from outlast.comm import Choice, CollectiveObserver, GradientReducer
from outlast.comm.direction import Adam
from outlast.trainer.config import Config
from outlast.trainer.engines.training import ModuleEngine, adam_direction


class DDPEngine(ModuleEngine):
    """PyTorch's DistributedDataParallel with outlast's reducer as its communication hook.

    Args:
        model: on its device; every rank must hold the same initial weights (DDP broadcasts rank 0's).
        config: all settings.
        device: where ``model`` is.
        observer: records every collective that reduces gradients.
        on_choice: called with what ``comm.compressor = "auto"`` became.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        device: torch.device,
        observer: CollectiveObserver | None = None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> None:
        self._ddp = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=config.trainer.bucket_mb,
            gradient_as_bucket_view=True,
            find_unused_parameters=config.trainer.find_unused_parameters,
        )
        optim = config.optim
        reducer = GradientReducer(
            model.named_parameters(),
            config.comm,
            observer=observer,
            direction=adam_direction(config),
            dense_direction=Adam(0.9 if optim.beta1 is None else optim.beta1, optim.beta2, optim.eps, optim.clip_rms),
            on_choice=on_choice,
        )
        reducer.attach(self._ddp)
        super().__init__(model, config, device, observer, reducer)

    @property
    def _called(self) -> nn.Module:
        return self._ddp

    def _reducing(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._ddp.no_sync()
