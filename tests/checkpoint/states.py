"""Small states whose every number is a function of step and rank, and their comparison bit for bit."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
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
    """Equal bit for bit, NaN like NaN, -0.0 unlike 0.0, 1 unlike 1.0 and True. `alike` tells kinds of dictionaries
    and their order apart, too."""
    if type(a) is not type(b) and not (isinstance(a, dict) and isinstance(b, dict)):
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


def alike(a: Any, b: Any) -> bool:
    """Type, order, attributes, bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        raw = [t.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype.str == b.dtype.str and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        if getattr(a, "default_factory", None) is not getattr(b, "default_factory", None):
            return False
        pairs = zip(a.items(), b.items(), strict=True)
        return (
            len(a) == len(b)
            and all(alike(k, j) and alike(v, w) for (k, v), (j, w) in pairs)
            and alike(getattr(a, "__dict__", None), getattr(b, "__dict__", None))
        )
    if isinstance(a, list | tuple | deque):
        if getattr(a, "maxlen", None) != getattr(b, "maxlen", None):
            return False
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, set | frozenset):
        return sorted(f"{type(x)} {x!r}" for x in a) == sorted(f"{type(x)} {x!r}" for x in b)
    if isinstance(a, float | complex):
        return repr(a) == repr(b)
    return bool(a == b)
