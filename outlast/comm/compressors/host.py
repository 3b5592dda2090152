"""Where numpy is used: for tensors in host memory, on which it is faster than torch.

Everything can also be done in torch operations alone, for tensors on other devices, with the same bytes.
"""

from __future__ import annotations

from torch import Tensor


def numpy_sees(x: Tensor) -> bool:
    """Whether ``x.numpy()`` may be used."""
    return x.device.type == "cpu"
