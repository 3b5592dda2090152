"""A tiny GPT, text that it learns something of in thirty steps, and what the tests of sharded models share."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outlast.comm import CommConfig
from outlast.trainer import GPT
from outlast.trainer.config import ModelConfig

CONTEXT = 32
STEPS = 30
LR = 3e-3
COMPRESSED: dict[str, Any] = {"dense_below": 256, "density": 0.1, "values": "fp32"}
GRADIENT = {**COMPRESSED, "feedback": "ef21", "target": "gradient", "warmup_steps": 10}
UPDATE = {**COMPRESSED, "feedback": "ef14", "target": "update"}
"""Without a warm-up: while whole tensors are sent nothing is held back, and with beta1 = 0 there is no momentum."""


def tiny_gpt() -> GPT:
    """82 000 parameters."""
    return GPT(ModelConfig(layers=2, heads=2, width=48, context=CONTEXT))


@cache
def text() -> Tensor:
    return torch.tensor(list(Path(argparse.__file__).read_bytes()))


def batch(step: int, rank: int, micro: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    """(tokens, targets), (size, CONTEXT) each; a function of its arguments."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * rank + micro)
    starts = torch.randint(len(text()) - CONTEXT - 1, (size,), generator=generator)
    rows = torch.stack([text()[start : start + CONTEXT + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def optimizer_of(parameters: Any, settings: Mapping[str, Any] | None) -> torch.optim.Optimizer:
    """The one that goes with what is averaged."""
    if settings is not None and CommConfig(**settings).target == "update":
        return torch.optim.SGD(parameters, lr=LR, weight_decay=0.01)
    return torch.optim.AdamW(parameters, lr=LR)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of every bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().to(torch.float64).contiguous().numpy().tobytes())
    return found.hexdigest()


def cloned(state: Mapping[str, Any]) -> dict[str, Any]:
    """A reducer's state as a checkpoint would hold it."""
    parts = {
        part: {name: {slot: tensor.clone() for slot, tensor in slots.items()} for name, slots in state[part].items()}
        for part in ("local", "replicated")
    }
    return {**parts, "meta": dict(state["meta"])}


def final(losses: list[float]) -> float:
    """The mean of the last five steps."""
    return sum(losses[-5:]) / 5
