"""A few elements of many tensors on a device, in two operations: what they were, and whether they still are that.

An update by a fused or compiled optimizer, or by a CUDA graph, leaves ``Tensor._version`` as it was. It changes nearly
all elements, so a few of each tensor tell. They are read in the device's own order of work: first behind all that was
queued when the snapshot began, then behind the copy. A change that comes later than the copy does no harm, and is not
found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLES = 16
"""Elements of each tensor."""


class Fingerprint:
    """Of tensors on one device, as they are in the order of the caller's stream.

    Args:
        tensors: held, and read again by :meth:`compare`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        views: defaultdict[torch.dtype, list[tuple[int, Tensor]]] = defaultdict(list)
        with torch.no_grad():
            for index, tensor in enumerate(tensors):
                if tensor.numel():
                    views[tensor.dtype].append((index, _sample(tensor)))
            self._places = [index for pairs in views.values() for index, view in pairs for _ in range(view.numel())]
            self._views = [[view for _, view in pairs] for pairs in views.values()]
            self._before = self._read()

    def compare(self) -> Tensor:
        """(elements,) bool on the device: which differ from what they were, in the order of the caller's stream."""
        with torch.no_grad():
            after = self._read()
            return torch.cat([_differ(*pair) for pair in zip(self._before, after, strict=True)] or [torch.zeros(0)])

    def first(self, differ: Tensor) -> int | None:
        """The index of the first tensor of which :meth:`compare` says, on the host, that it differs; None: no one."""
        places = differ.nonzero().view(-1).tolist()
        return min((self._places[place] for place in places), default=None)

    def _read(self) -> list[Tensor]:
        return [torch.cat(views) for views in self._views]


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """(n,) bool: bit for bit, so that NaN equals itself."""
    width = one.element_size()
    raw = [x.contiguous().view(torch.uint8).view(-1, width) for x in (one, other)]
    return (raw[0] != raw[1]).any(1)


def _sample(tensor: Tensor) -> Tensor:
    """A view of up to SAMPLES elements, evenly spread over a tensor whose elements lie end to end, first included; of
    another, along its longest dimension."""
    if tensor.is_conj() or tensor.is_neg():
        return tensor.flatten()[:SAMPLES]
    if tensor.dtype.itemsize == 1:
        tensor = tensor.view(torch.uint8)
    if not _dense(tensor):
        longest = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
        for d in reversed(range(tensor.dim())):
            if d != longest:
                tensor = tensor.select(d, 0)
        count, stride = tensor.shape[0], tensor.stride(0)
    else:
        count, stride = tensor.numel(), 1
    samples = min(SAMPLES, count)
    return tensor.as_strided((samples,), (stride * max(1, (count - 1) // max(1, samples - 1)),))


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
