"""The models of a session: what averages their gradients, and their state as a checkpoint holds it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from outlast.checkpoint import check_like
from outlast.deepspeed_compat import is_engine
from outlast.errors import SessionError, StateMismatch

State = dict[str, Any]
Kind = Literal["ddp", "fsdp2", "deepspeed", "alone"]
_REFUSED = {
    "deepspeed.PipelineEngine": "use a DeepSpeed engine with data parallelism alone, of a model without PipelineModule",
    "torch.FullyShardedDataParallel": "shard it with torch.distributed.fsdp.fully_shard (FSDP2) instead",
    "torch.DataParallel": "use DistributedDataParallel, with one process for each device",
}
"""Kinds of models that a session cannot serve, and what to do."""


def kind_of(model: nn.Module) -> Kind:
    """What averages this model's gradients: DDP, FSDP2, a DeepSpeed engine, or nothing.

    Raises:
        SessionError: it is neither a model nor something that a session can serve.
    """
    if not isinstance(model, nn.Module):
        raise SessionError(
            f"Session: the model is a {type(model).__name__}",
            "give a torch.nn.Module, wrapped or not, or a dictionary of them",
        )
    for one in (model, unwrapped(model)):
        kind = f"{type(one).__module__.partition('.')[0]}.{type(one).__name__}"
        if kind in _REFUSED:
            raise SessionError(f"Session: the model is a {type(one).__name__}", _REFUSED[kind])
    if is_engine(model):
        return "deepspeed"
    if isinstance(unwrapped(model, keep_ddp=True), DistributedDataParallel):
        return "ddp"
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is not None and any(isinstance(module, sharded) for module in model.modules()):
        return "fsdp2"
    return "alone"


def unwrapped(model: nn.Module, *, keep_ddp: bool = False) -> nn.Module:
    """The module itself, whose names do not depend on torch.compile, DDP and DeepSpeed around it."""
    while True:
        if is_engine(model):
            model = model.module  # type: ignore[assignment]
        inner = getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif isinstance(model, DistributedDataParallel) and not keep_ddp:
            model = model.module
        else:
            return model


def device_of(models: Iterable[nn.Module]) -> torch.device:
    """Where the parameters of the first of them that has any are."""
    return next((param.device for model in models for param in model.parameters()), torch.device("cpu"))


def wrapped(model: nn.Module, world_size: int) -> nn.Module:
    """The model, in DDP if there are several ranks and nothing averages its gradients yet. Collective then."""
    if world_size == 1 or kind_of(model) != "alone" or not any(p.requires_grad for p in model.parameters()):
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


@dataclass(slots=True)
class Trained:
    """A model with the optimizers that update it."""

    name: str
    """Among the session's models; empty if there is one."""
    model: nn.Module
    optimizer: Optimizer | None
    is_kept: bool = False
    """Whether the optimizer's moments are a reducer's, which saves them."""
    _expected: dict[str, torch.Size] = field(init=False)
    _updates: int = 0

    def __post_init__(self) -> None:
        self._expected = self.shapes()

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of it, as DTensors."""
        return kind_of(self.model) == "fsdp2"

    @property
    def updates(self) -> int:
        """How often its optimizer has updated it since :meth:`count_updates`."""
        return self._updates

    @property
    def lr(self) -> float | None:
        """The learning rate, of the optimizer's first group."""
        return None if self.optimizer is None else float(self.optimizer.param_groups[0]["lr"])

    def count_updates(self) -> Callable[[], None]:
        """Count them until what is returned is called."""

        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._updates += 1

        return (lambda: None) if self.optimizer is None else self.optimizer.register_step_post_hook(note).remove

    def check_step(self, step: int) -> None:
        """Raise SessionError if a step may not end here."""

    def shapes(self) -> dict[str, torch.Size]:
        """Of its parameters, by name."""
        return {name: param.shape for name, param in unwrapped(self.model).named_parameters()}

    def parameters(self) -> int:
        """How many entries are trained."""
        return sum(p.numel() for p in unwrapped(self.model).parameters() if p.requires_grad)

    def check_unchanged(self) -> None:
        """Raise SessionError if the model has other parameters than when the session began."""
        now = self.shapes()
        if now == self._expected:
            return
        added = sorted(now.keys() - self._expected.keys())
        gone = sorted(self._expected.keys() - now.keys())
        reshaped = sorted(key for key in now.keys() & self._expected.keys() if now[key] != self._expected[key])
        found = [
            f"{what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for what, names in (("new", added), ("gone", gone), ("of another shape", reshaped))
            if names
        ]
        model = f"model {self.name!r}" if self.name else "the model"
        raise SessionError(
            f"{model} has changed since the session began: {'; '.join(found)}",
            "change a model before Session(...), or close this session and begin another one",
        )

    def state(self) -> tuple[State, State, State]:
        """Parameters, the rest of the model's state (buffers), and the optimizer's state, unless a reducer keeps that.
        The tensors are live."""
        module = unwrapped(self.model)
        if self.is_sharded and self.optimizer is not None and not self.is_kept:
            from torch.distributed.checkpoint.state_dict import get_state_dict

            whole, optimizer = get_state_dict(self.model, self.optimizer)
        else:
            whole = module.state_dict()
            optimizer = {} if self.optimizer is None or self.is_kept else self.optimizer.state_dict()
        return *split(module, whole), optimizer

    def load(self, params: Mapping[str, Any], rest: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
        """Load a copy of what :meth:`state` returned.

        Among the parameters there may be the model's buffers, of which ``rest`` has this rank's own.

        Raises:
            StateMismatch: names what does not match; nothing of this model has been loaded then.
        """
        module = unwrapped(self.model)
        if self.is_sharded and self.optimizer is not None and not self.is_kept:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=dict(params) | dict(rest),
                optim_state_dict=dict(optimizer),
                options=StateDictOptions(strict=False),
            )
            return
        if not self.is_sharded:  # what is sharded was compared as it was read
            running, buffers, _ = self.state()
            own = tensors_in(buffers)
            check_like({name: value for name, value in params.items() if name not in own}, running)
            check_like(tensors_in(rest), own)
        module.load_state_dict({**params, **rest})
        if self.optimizer is not None and (optimizer or not self.is_kept):
            try:
                self.optimizer.load_state_dict(dict(optimizer))
            except (ValueError, KeyError) as error:
                raise StateMismatch(
                    f"the optimizer's state in the checkpoint does not fit {type(self.optimizer).__name__}: {error}",
                    "make the optimizer as it was when the checkpoint was saved, or begin a new run",
                ) from error


def split(module: nn.Module, state: Mapping[str, Any] | None = None) -> tuple[State, State]:
    """Its parameters, which are equal on all ranks, and the rest: what forward changes on each rank in its own way.

    Args:
        module: whose names count.
        state: its state; None takes ``module.state_dict()``.
    """
    state = module.state_dict() if state is None else state
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    params = {name: _bare(value) for name, value in state.items() if name in names}
    return params, {name: _bare(value) for name, value in state.items() if name not in names}


def _bare(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def tensors_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of its values that are tensors."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
