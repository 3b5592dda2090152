"""A few elements of tensors on a GPU, read twice to tell whether the tensors changed in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from outlast.checkpoint.state.tree import TensorEntry
from outlast.errors import SnapshotMutated

SAMPLES = 16
"""Elements of each tensor."""


class DeviceSample:
    """Samples of the tensors of one device, gathered in the current stream when it is made; nothing is waited for.

    Changes between then and :meth:`take_again` are found where they touch a sample. An optimizer's update touches
    nearly all elements.

    Args:
        items: whose tensors; all on one device.
    """

    def __init__(self, items: Sequence[TensorEntry]) -> None:
        self.device = items[0].tensor.device if items else torch.device("cpu")
        by_type: dict[torch.dtype, list[TensorEntry]] = {}
        for item in items:
            if item.tensor.numel():
                by_type.setdefault(item.tensor.dtype, []).append(item)
        self._groups = list(by_type.values())
        self._before = [_gather(group) for group in self._groups]
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def take_again(self, stream: torch.cuda.Stream) -> None:
        """Gather once more, in ``stream``, behind what is queued there."""
        if not self._groups:
            return
        with torch.no_grad(), torch.cuda.stream(stream):
            after = [_gather(group) for group in self._groups]
            for before in self._before:
                before.record_stream(stream)
            pairs = zip(self._before, after, strict=True)
            self._pairs = [(_to_host(before), _to_host(now)) for before, now in pairs]

    def check(self) -> None:
        """Compare; only once what :meth:`take_again` queued has run.

        Raises:
            SnapshotMutated: names the first tensor that changed.
        """
        for group, (before, after) in zip(self._groups, self._pairs, strict=True):
            if torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
                continue
            at = 0
            for item in group:
                end = at + min(SAMPLES, item.tensor.numel())
                if not torch.equal(before[at:end].view(torch.uint8), after[at:end].view(torch.uint8)):
                    raise mutated(item.name, "its elements differ")
                at = end


def mutated(name: str, evidence: str) -> SnapshotMutated:
    """The error for a tensor that changed while it was being copied."""
    return SnapshotMutated(
        f"the tensor {name!r} was changed before wait_copied() returned ({evidence})",
        "call wait_copied() before the optimizer's update and whatever else changes saved tensors, or name the "
        "top-level key of tensors that change earlier in `eager`",
    )


def _gather(items: Sequence[TensorEntry]) -> torch.Tensor:
    return torch.cat([_elements(item.tensor.detach()) for item in items])


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """A few elements, evenly spread; a view where it can be, so that one launch reads those of many tensors."""
    count = tensor.numel()
    samples = min(SAMPLES, count)
    step = max(1, (count - 1) // max(1, samples - 1))
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()
    return flat[: (samples - 1) * step + 1 : step]


def _to_host(sample: torch.Tensor) -> torch.Tensor:
    host = torch.empty(sample.shape, dtype=sample.dtype, pin_memory=True)
    return host.copy_(sample, non_blocking=True)
