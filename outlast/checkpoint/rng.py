"""State of the random number generators that a model or a data pipeline may use, as tensors and JSON values.

It is each rank's own, and the next forward pass changes it::

    import outlast
    from outlast.checkpoint.rng import rng_state

    checkpointer = outlast.checkpoint.attach("runs/mine/checkpoints")
    checkpointer.save(step, local={"rng": rng_state()}, eager={"rng"})
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's global generators on this rank (the current CUDA device's too)."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"].to(torch.uint8))
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    saved = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": saved["key"].numpy().astype(np.uint32), "pos": saved["position"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    if "cuda" in state and torch.cuda.is_available():  # before anything has used CUDA, it is set once something does
        torch.cuda.set_rng_state(state["cuda"].to(torch.uint8))
