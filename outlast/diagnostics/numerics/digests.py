"""Digests of tensors, computed where they are, without a copy: of their bits, so that each of them counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from outlast.diagnostics.numerics.model_parts import local

_COLUMNS = 1024
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)
"""Of the golden ratio; odd, so that multiplying by it loses nothing."""


class Digests:
    """Of many tensors, one number of 64 bits each.

    A tensor's bits are taken as integers and summed in columns, of each 1024th element, whose sums are multiplied by
    odd weights, another one for each column, modulo 2**64. A single changed element always changes the digest. Changes
    of several go unseen if they cancel out, as those of two elements of a column that were exchanged. Each tensor is
    read once, in a few operations.
    """

    def __init__(self) -> None:
        self._weights: dict[torch.device, Tensor] = {}

    def of(self, tensors: Sequence[Tensor]) -> list[int]:
        """The digests; the host waits once for each device."""
        found: list[int | None] = [None] * len(tensors)
        by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
        with torch.no_grad():
            for number, tensor in enumerate(tensors):
                part = local(tensor)
                by_device.setdefault(part.device, []).append((number, self.on_device(part)))
            for pairs in by_device.values():
                for (number, _), value in zip(pairs, torch.stack([one for _, one in pairs]).tolist(), strict=True):
                    found[number] = value
        return [0 if value is None else value for value in found]

    def on_device(self, tensor: Tensor) -> Tensor:
        """The digest of one tensor, int64 on its device; nothing is waited for."""
        flat = tensor.resolve_conj().resolve_neg()
        if flat.is_complex():
            flat = torch.view_as_real(flat)
        if flat.dtype is torch.bool:
            flat = flat.to(torch.uint8)
        flat = flat.reshape(-1).view(_AS_INTEGERS[flat.dtype.itemsize])
        weights = self._weights.get(flat.device)
        if weights is None:
            weights = (torch.arange(1, _COLUMNS + 1, device=flat.device) * _PRIME) | 1
            self._weights[flat.device] = weights
        whole = flat.numel() // _COLUMNS * _COLUMNS
        sums = flat[:whole].view(-1, _COLUMNS).sum(0, dtype=torch.int64)
        rest = flat[whole:]
        total = (sums * weights).sum()
        return total + (rest.to(torch.int64) * weights[: rest.numel()]).sum() * _PRIME


def replicated(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Parameters, and the tensors that the optimizer keeps of them, by a name that says which it is. Live."""
    ignored = ignored_by_ddp(model)
    names = {param: name for name, param in model.named_parameters() if name not in ignored}
    found: dict[str, Tensor] = {name: param for param, name in names.items()}
    if optimizer is not None:
        for param, name in names.items():
            state = optimizer.state.get(param, {})
            if isinstance(state, Mapping):
                found |= {f"{key} of {name}": value for key, value in state.items() if isinstance(value, Tensor)}
    return found


def ignored_by_ddp(model: nn.Module) -> set[str]:
    """Parameters that DDP was told to leave alone, as experts that each rank has its own of: they are no replicas."""
    names = {name for name, _ in model.named_parameters()}
    return names & set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))


def shares_its_state(optimizer: Optimizer | None) -> bool:
    """Whether an optimizer keeps on each rank a part of the state, as ZeroRedundancyOptimizer does."""
    return optimizer is not None and callable(getattr(optimizer, "consolidate_state_dict", None))
