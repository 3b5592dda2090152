"""AdamW with linear warm-up and cosine decay, and its state by parameter name."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from outlast.errors import StateMismatch
from outlast.trainer.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, *, directed: bool = False) -> Optimizer:
    """Fused AdamW (arXiv:1711.05101); matrices are decayed, 1-D parameters are not.

    Args:
        model: the model to train.
        config: settings.
        directed: ``.grad`` already holds Adam's direction (``comm.target = "update"``), so what is left of a step of
            AdamW is ``x -= lr * (grad + weight_decay * x)``.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if directed:
        # torch has no fused SGD for shards. (To import DTensor takes a second.)
        sharded = any(hasattr(p, "full_tensor") for p in parameters)
        return SGD(groups, lr=config.lr, fused=not sharded)
    beta1 = 0.9 if config.beta1 is None else config.beta1
    return AdamW(groups, lr=config.lr, betas=(beta1, config.beta2), eps=config.eps, fused=True)


def lr_share(index: int, config: OptimConfig, steps: int) -> float:
    """The learning rate of step ``index + 1`` as a share of its peak: linear warm-up, a cosine to ``min_lr_share``."""
    if index < config.warmup_steps:
        return (index + 1) / config.warmup_steps
    progress = min(1.0, (index - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.min_lr_share + (1 - config.min_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))


def build_scheduler(optimizer: Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """:func:`lr_share` as a scheduler that is stepped after each update."""
    return _OwnSchedule(optimizer, lambda index: lr_share(index, config, steps))


class _OwnSchedule(LambdaLR):
    """Tells our own schedule from a LambdaLR of the user's."""


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's tensors by parameter name, then by their name in the optimizer; not copied."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: dict(slots) for parameter, slots in optimizer.state.items()}


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, saved: dict[str, dict[str, Any]]) -> None:
    """Load :func:`optimizer_state`'s tensors, onto the parameters' devices; hyperparameters are not loaded."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state = {index: saved[name] for index, name in enumerate(ordered) if name in saved}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def scheduler_state(scheduler: LRScheduler) -> dict[str, Any]:
    """A schedule's ``state_dict``; of one that is not ours also what it has set in the optimizer's groups."""
    state = dict(scheduler.state_dict())
    if not isinstance(scheduler, _OwnSchedule):
        groups = scheduler.optimizer.param_groups
        state["groups"] = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return state


def load_scheduler_state(scheduler: LRScheduler, saved: dict[str, Any]) -> None:
    """Load :func:`scheduler_state`. Of our own schedule the number of steps is taken: peak and shape are those of the
    running one.

    Raises:
        StateMismatch: a schedule of another kind was saved.
    """
    if isinstance(scheduler, _OwnSchedule):
        _load_own(scheduler, saved)
        return
    groups = scheduler.optimizer.param_groups
    if len(saved.get("groups", ())) != len(groups):
        raise StateMismatch(
            f"the checkpoint has no state of a schedule like optim.scheduler for {len(groups)} groups of parameters",
            "resume with the schedule that was saved, or begin a new run with run.start_from",
        )
    scheduler.load_state_dict({key: value for key, value in saved.items() if key != "groups"})
    for group, values in zip(groups, saved["groups"], strict=True):
        for key, value in values.items():  # a tuple comes back from a checkpoint as a list
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _load_own(scheduler: LambdaLR, saved: dict[str, Any]) -> None:
    steps = int(saved["last_epoch"])
    rates = [base * share(steps) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch = steps
    scheduler._step_count = steps + 1
    scheduler._last_lr = rates
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
