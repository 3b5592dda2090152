"""What a program hands to a session, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

from torch import nn
from torch.optim import Optimizer

from outlast.checkpoint import CheckpointConfig
from outlast.config import nearest
from outlast.diagnostics.numerics import NumericsConfig
from outlast.errors import SessionError, UnknownKey
from outlast.session.models import kind_of

Numerics = NumericsConfig | Mapping[str, Any] | bool | None
"""How a session's ``numerics`` may be given."""
ConfigT = TypeVar("ConfigT", CheckpointConfig, NumericsConfig)


def named(
    model: nn.Module | Mapping[str, nn.Module], optimizer: Optimizer | Mapping[str, Optimizer] | None
) -> tuple[dict[str, nn.Module], dict[str, Optimizer]]:
    """Models and optimizers by name; one model without a name has the empty one.

    Raises:
        SessionError: what they are is not what a session can serve; or an optimizer has no model.
    """
    models = dict(model) if isinstance(model, Mapping) else {"": model}
    if optimizer is None:
        optimizers: dict[str, Optimizer] = {}
    else:
        optimizers = dict(optimizer) if isinstance(optimizer, Mapping) else {"": optimizer}
    for one in models.values():
        kind_of(one)
    if isinstance(model, Mapping) and (not models or "" in models):
        raise SessionError(f"Session: models by name, {sorted(models)}", "give each of them a name")
    unknown = sorted(optimizers.keys() - models.keys())
    if unknown:
        raise SessionError(
            f"Session: optimizers {unknown} for models {sorted(models)}",
            "give optimizers under the names of their models: Session(run, {'net': net}, {'net': optimizer})",
        )
    for name, held_by in optimizers.items():
        if kind_of(models[name]) == "deepspeed":
            raise SessionError(
                f"Session: a {type(held_by).__name__} for a DeepSpeed engine, which has an optimizer inside",
                "leave it out: Session(run, engine)",
            )
        if not isinstance(held_by, Optimizer):
            raise SessionError(
                f"Session: the optimizer is a {type(held_by).__name__}",
                "give a torch.optim.Optimizer; wrappers of one are given as what they wrap, and added: session.add()",
            )
        held = {id(param) for param in models[name].parameters()}
        foreign = sum(id(param) not in held for group in held_by.param_groups for param in group["params"])
        if foreign:
            raise SessionError(
                f"Session: {foreign} of the optimizer's tensors are not parameters of the model",
                "make the optimizer after the model is wrapped, moved or sharded, of model.parameters()",
            )
    return models, optimizers


def checkpoint_settings(
    checkpoint: CheckpointConfig | Mapping[str, Any] | Literal[False] | None,
) -> CheckpointConfig | None:
    """The settings of checkpoints; None if there are to be none.

    Raises:
        ConfigError: a setting is unknown, or wrong.
    """
    return None if checkpoint is False else _settings(CheckpointConfig, "checkpoint", checkpoint or {})


def numerics_settings(numerics: Numerics) -> NumericsConfig | None:
    """The settings of the watch on numbers; None if nothing is to be watched.

    Raises:
        ConfigError: a setting is unknown, or wrong.
    """
    if numerics is None or numerics is False:
        return None
    return _settings(NumericsConfig, "numerics", {} if numerics is True else numerics)


def _settings(config: type[ConfigT], what: str, given: ConfigT | Mapping[str, Any]) -> ConfigT:
    """An instance as it is, or made of a dictionary."""
    if isinstance(given, config):
        return given
    assert isinstance(given, Mapping)
    known = [field.name for field in fields(config)]
    for name in given:
        if name not in known:
            raise UnknownKey(f"Session: {what} has no setting {name}", nearest(name, known))
    return config(**given)
