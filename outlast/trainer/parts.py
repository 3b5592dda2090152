"""The model, the loss, the optimizer and the schedule of a run, from its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from outlast.errors import ConfigError
from outlast.trainer.batches import Batch, call_model, loss_in, split_target
from outlast.trainer.config import Config
from outlast.trainer.factories import Factory
from outlast.trainer.model import GPT
from outlast.trainer.optim import build_optimizer, build_scheduler

LossOf = Callable[[Callable[..., Any], Batch], Tensor]
"""From a model, or what wraps it, and a batch on its device to the loss, a scalar."""


def check_factories(config: Config) -> None:
    """Import what the settings name, and compare arguments; nothing is called.

    Raises:
        ConfigError: see :class:`Factory`.
    """
    _model_factory(config)
    _loss_factory(config)
    _optimizer_factory(config)
    _scheduler_factory(config)


def build_model(config: Config) -> nn.Module:
    """The model on the CPU, the same on every rank: its initial weights are seeded by ``run.seed``.

    Raises:
        ConfigError: the factory does not fit its arguments, returns no model, or one that cannot be trained.
    """
    factory = _model_factory(config)
    if factory is None:
        return GPT(config.model, seed=config.run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = factory()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{factory} returned a {type(model).__name__}, not a torch.nn.Module")
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ConfigError(f"{factory} returned a model without a parameter that requires a gradient")
    if any(parameter.is_meta for parameter in parameters):
        raise ConfigError(f"{factory} returned a model on the meta device", "give its parameters values")
    return model.train()


def flops_per_token(model: nn.Module) -> float:
    """FLOPs of forward and backward per token; of a model that does not tell, six for each parameter."""
    if isinstance(model, GPT):
        return model.flops_per_token()
    return 6.0 * sum(parameter.numel() for parameter in model.parameters())


def build_loss(config: Config) -> LossOf:
    """How a batch becomes a loss.

    Raises:
        ConfigError: ``model.loss`` does not fit its arguments. When it is called: there is no loss, or no target.
    """
    factory = _loss_factory(config)
    if factory is None:
        return lambda model, batch: loss_in(call_model(model, batch))
    loss = factory() if inspect.isclass(factory.target) else factory
    if not callable(loss):
        raise ConfigError(f"{factory} made a {type(loss).__name__}, which cannot be called")

    def computed(model: Callable[..., Any], batch: Batch) -> Tensor:
        inputs, target = split_target(batch)
        return loss_in(loss(call_model(model, inputs), target))

    return computed


def make_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """The optimizer of ``[optim]``, for what ``comm.target`` puts into gradients.

    Raises:
        ConfigError: the factory does not fit its arguments, or returns something else.
    """
    factory = _optimizer_factory(config)
    if factory is None:
        return build_optimizer(model, config.optim, directed=config.comm.target == "update")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = factory(parameters, lr=config.optim.lr, model=model)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"{factory} returned a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    return optimizer


def make_scheduler(optimizer: Optimizer, config: Config) -> LRScheduler:
    """The schedule of ``[optim]``.

    Raises:
        ConfigError: the factory does not fit its arguments, or returns something else.
    """
    factory = _scheduler_factory(config)
    if factory is None:
        return build_scheduler(optimizer, config.optim, config.trainer.steps)
    scheduler = factory(optimizer, steps=config.trainer.steps)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(f"{factory} made a schedule that follows a metric", "name one that follows steps")
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(
            f"{factory} returned a {type(scheduler).__name__}, not a torch.optim.lr_scheduler.LRScheduler"
        )
    return scheduler


def _model_factory(config: Config) -> Factory | None:
    model = config.model
    return None if model.factory is None else Factory("model.factory", model.factory, model.arguments)


def _optimizer_factory(config: Config) -> Factory | None:
    optim = config.optim
    if optim.factory is None:
        return None
    return Factory("optim.factory", optim.factory, optim.arguments, offered=("lr", "model"), positional=1)


def _scheduler_factory(config: Config) -> Factory | None:
    optim = config.optim
    if optim.scheduler is None:
        return None
    return Factory(
        "optim.scheduler",
        optim.scheduler,
        optim.scheduler_arguments,
        offered=("steps",),
        positional=1,
        shown="optim.scheduler_arguments",
    )


def _loss_factory(config: Config) -> Factory | None:
    model = config.model
    if model.loss is None:
        return None
    shown = "model.loss_arguments"
    return Factory("model.loss", model.loss, model.loss_arguments, positional=2, made_once=True, shown=shown)
