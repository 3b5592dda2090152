"""What the tests of export and import share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpoint.format.dtypes import DISGUISED, NATIVE
from outlast.checkpoint.tools import verify
from tests.checkpoint.helpers import checkpointer

ALL_DTYPES = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in (*NATIVE, *DISGUISED)}
ODD = {
    "model": {"a.w": torch.randn(4, 3).bfloat16(), "a.b": torch.ones(3).to(torch.float8_e5m2), "s": torch.tensor(2.5)},
    "deep": {"x/y": {"z%": torch.arange(3), "empty": torch.empty(0, 2)}},
    "numbers": {"inf": math.inf, "n": None, "yes": True, "big": 2**70, "list": [1, 2.0, {"k": "é"}], "zero": -0.0},
    "top": 7,
}


def have_safetensors() -> bool:
    try:
        import safetensors  # noqa: F401
    except ImportError:
        return False
    return True


needs_safetensors = pytest.mark.skipif(not have_safetensors(), reason="the extra safetensors is not installed")
FORMATS = ["torch", "dcp", pytest.param("safetensors", marks=needs_safetensors)]


def save(url: Path, replicated: dict[str, Any], step: int = 4) -> None:
    with checkpointer(url) as saver:
        saver.save(step, replicated=replicated, local={})
    assert verify(url, step).ok


def restored(url: Path | str) -> tuple[int, dict[str, Any]]:
    with checkpointer(url, attempt_id="reader") as reader:
        found = reader.restore("auto")
    assert found is not None
    return found.step, found.replicated


def leftovers(folder: Path) -> list[str]:
    """What temporary files or folders there are."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
