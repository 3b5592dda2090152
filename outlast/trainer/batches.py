"""Batches: how they reach the model's device, the model and the loss, and how large they are.

A batch is a tensor, a tuple or list, or a mapping; whatever is in it that is not a tensor is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from outlast.errors import ConfigError

Batch = Any
TARGETS = ("labels", "label", "targets", "target")
"""What a batch that is a mapping may call its target; the first of these that it has is the one."""


def in_form(pair: tuple[Tensor, Tensor], form: str) -> Batch:
    """Tokens and targets, as ``data.form`` says that the model wants them."""
    return {"input_ids": pair[0], "labels": pair[0]} if form == "transformers" else pair


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``, in tuples, lists and dictionaries."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(value, device) for value in batch)
    return batch


def size_of(batch: Batch) -> int:
    """How many tokens the batch has; samples, where its first tensor is not of whole numbers in two dimensions."""
    first = _first_tensor(batch)
    if first is None or first.dim() == 0:
        return 1
    tokens = first.dim() >= 2 and not first.dtype.is_floating_point and not first.dtype.is_complex
    return first.numel() if tokens else first.shape[0]


def call_model(model: Callable[..., Any], batch: Batch) -> Any:
    """``model(**batch)`` of a mapping, ``model(*batch)`` of a tuple or list, else ``model(batch)``."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def split_target(batch: Batch) -> tuple[Batch, Any]:
    """What the model gets, and the target: of a tuple the last item, of a mapping one of :data:`TARGETS`.

    Raises:
        ConfigError: it has none.
    """
    if isinstance(batch, Mapping):
        for key in TARGETS:
            if key in batch:
                return {name: value for name, value in batch.items() if name != key}, batch[key]
        raise ConfigError(
            f"model.loss needs a target, and a batch has only {', '.join(map(str, batch))}",
            f"call it one of {', '.join(TARGETS)}",
        )
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[:-1], batch[-1]
    raise ConfigError(f"model.loss needs a target, and a batch is {_describe(batch)}", "make batches (inputs, target)")


def loss_in(output: Any) -> Tensor:
    """The loss in what a model returned: a scalar, or ``.loss`` or ``["loss"]`` of it.

    Raises:
        ConfigError: there is none.
    """
    loss = output
    if not isinstance(output, Tensor):
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        raise ConfigError(
            f"the model returned {_describe(output)}, and no loss (a scalar, or an output with .loss)",
            "set model.loss, or pass the model what it needs to compute one (data.form, or labels in the batch)",
        )
    return loss


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for each in inside if (found := _first_tensor(each)) is not None), None)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value)) or 'nothing'}"
    return f"a {type(value).__name__}"
