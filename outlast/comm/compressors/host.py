"""Where numpy is used: for tensors in the memory of the host, on which it is faster than torch.

Everything has a way in torch operations alone besides, for tensors on other devices, which gives the same bytes.
"""

from __future__ import annotations

from torch import Tensor


def numpy_sees(x: Tensor) -> bool:
    """Whether ``x.numpy()`` may be used."""
    return x.device.type == "cpu"
