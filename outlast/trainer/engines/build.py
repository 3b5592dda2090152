"""The engine that ``trainer.engine`` names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from outlast.comm import Choice, CollectiveObserver
from outlast.trainer.config import Config
from outlast.trainer.engines.base import Engine
from outlast.trainer.engines.ddp import DDPEngine


def build_engine(
    model: nn.Module,
    config: Config,
    device: torch.device,
    observer: CollectiveObserver | None = None,
    on_choice: Callable[[Choice], None] | None = None,
) -> Engine:
    """Wrap the model, which is on its device; collective.

    Args:
        model: with the same weights on every rank.
        config: all settings.
        device: where ``model`` is.
        observer: records every collective that reduces gradients.
        on_choice: called with what ``comm.compressor = "auto"`` became.

    Raises:
        CommError, ConfigError: what the settings ask for cannot be done with this engine.
    """
    if config.trainer.engine == "fsdp2":
        from outlast.trainer.engines.fsdp2 import FSDP2Engine  # seconds of imports

        return FSDP2Engine(model, config, device, observer)
    if config.trainer.engine == "deepspeed":
        from outlast.trainer.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, config, device, observer)
    return DDPEngine(model, config, device, observer, on_choice)
