"""Small states whose every number is a function of step and rank, and their comparison bit for bit."""

from __future__ import annotations

import math
from typing import Any

import torch


def state(step: int) -> dict[str, Any]:
    """A replicated state whose every number is a function of the step."""
    return {
        "model": {
            "blocks.0.attn.qkv.weight": torch.arange(24.0).reshape(4, 6) + step,
            "blocks.0.norm.bias": torch.full((6,), step, dtype=torch.bfloat16),
        },
        "optimizer": {
            "blocks.0.norm.bias": {"exp_avg": torch.full((6,), 0.5 * step), "step": torch.tensor(float(step))}
        },
        "scheduler": {"last_step": step, "lr": 0.1 / (step + 1), "worst": math.inf},
        "data": {"position": [step, 3 * step], "seed": 17},
    }


def local(step: int, rank: int = 0) -> dict[str, Any]:
    """A rank's local state."""
    return {
        "rng": {"cpu": torch.full((5,), 10 * step + rank, dtype=torch.uint8)},
        "comm": {"w": {"e": torch.tensor(rank)}},
    }


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, NaN like NaN, -0.0 unlike 0.0, 1 unlike 1.0 and True."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        raw = [t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return torch.equal(raw[0], raw[1])
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)
