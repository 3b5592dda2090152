"""Buffers that a forward changes, such as BatchNorm's, on each rank by another batch.

A checkpoint has each rank's own, with which it goes on, and rank 0's as the model's, for whoever wants one: a new rank,
a new run, an export.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from outlast.comm import CollectiveObserver


def of_rank_0(buffers: Mapping[str, Tensor], observer: CollectiveObserver | None = None) -> dict[str, Tensor]:
    """Copies of rank 0's buffers, the same on all ranks. Collective if there are any, and a process group.

    Args:
        buffers: this rank's, by name; of any shapes and dtypes, on one device.
        observer: records the broadcast.
    """
    if not buffers or not dist.is_initialized():
        return {name: buffer.detach().clone() for name, buffer in buffers.items()}
    bare = {name: buffer.detach().contiguous() for name, buffer in buffers.items()}
    parts = [buffer.reshape(-1).view(torch.uint8) for buffer in bare.values()]
    content = torch.cat(parts)
    token = None if observer is None else observer.enter("broadcast", content.nbytes, "buffers")
    dist.broadcast(content, src=0)
    if observer is not None and token is not None:
        observer.complete(token)
    sizes = [part.numel() for part in parts]
    return {
        name: part.clone().view(buffer.dtype).reshape(buffer.shape)
        for (name, buffer), part in zip(bare.items(), torch.split(content, sizes), strict=True)
    }
