"""What can be averaged: refused by name when a reducer is made or attached, and checked where DDP hands it over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from outlast.comm.ddp.hook import Bucket
from outlast.errors import CommError


def refuse_complex(named: Iterable[tuple[str, Tensor]]) -> None:
    """Complex parameters: a gradient would have half as many entries as its message.

    Raises:
        CommError: names the first.
    """
    for name, param in named:
        if param.requires_grad and param.is_complex():
            raise CommError(
                f"parameter {name!r} is complex ({param.dtype}), and only real gradients can be averaged",
                "keep its real and imaginary part: nn.Parameter(torch.view_as_real(z)), torch.view_as_complex(p)",
            )


def refuse_sparse(model: nn.Module) -> None:
    """Modules that make sparse gradients.

    Raises:
        CommError: names the first.
    """
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "sparse", False) is True and getattr(weight, "requires_grad", False):
            raise CommError(
                f"{path or type(module).__name__} makes sparse gradients, which cannot be averaged",
                f"make it with {type(module).__name__}(..., sparse=False); compression sends few entries all the same",
            )


def refuse_ddp(ddp: DistributedDataParallel) -> None:
    """Settings of DDP under which its communication hook is not called, or not with buckets.

    Raises:
        CommError: names the setting.
    """
    refused = {
        'torch._dynamo.config.optimize_ddp = "python_reducer"': (
            getattr(ddp, "_use_python_reducer", False),
            'set it to "ddp_optimizer" before the model is wrapped in DistributedDataParallel',
        ),
        "skip_all_reduce_unused_params": (
            getattr(ddp, "skip_all_reduce_unused_params", False),
            "leave it out, and set find_unused_parameters=True",
        ),
        "mixed_precision, which averages with a hook of its own": (
            getattr(ddp, "mixed_precision", None) is not None,
            "use torch.autocast",
        ),
        "delay_all_reduce_named_params, which it averages itself": (
            bool(getattr(ddp, "_delay_all_reduce_params", ())),
            "leave it out",
        ),
    }
    for what, (is_set, fix) in refused.items():
        if is_set:
            raise CommError(f"gradients cannot be compressed under DistributedDataParallel with {what}", fix)


def refuse_sparse_gradient(name: str, grad: Tensor) -> None:
    """A gradient that is not dense.

    Raises:
        CommError: names the parameter.
    """
    if grad.layout != torch.strided:
        raise CommError(
            f"the gradient of {name!r} is sparse ({grad.layout}), and only dense ones can be averaged",
            "make the embedding with sparse=False",
        )


def check_bucket(bucket: Bucket, names: Sequence[str]) -> None:
    """The gradients of a bucket are its buffer, cut up: no gap, no overlap, no other type. What is not covered would
    be taken for an average, and was averaged by nobody.

    Args:
        bucket: from DDP.
        names: of its parameters.

    Raises:
        CommError: names the parameter.
    """
    buffer = bucket.buffer()
    refuse_sparse_gradient(names[0], buffer)
    size = buffer.element_size()
    start, end = buffer.data_ptr(), 0
    grads = bucket.gradients()
    for offset, index in sorted((grad.data_ptr() - start, i) for i, grad in enumerate(grads) if grad.numel()):
        grad = grads[index]
        if grad.dtype != buffer.dtype or offset != end or not _without_holes(grad):
            raise CommError(
                f"the gradient of {names[index]!r} (shape {tuple(grad.shape)}, {grad.dtype}, byte {offset} of its "
                f"bucket) is not the next piece of the bucket ({buffer.dtype}, byte {end} of "
                f"{buffer.numel() * size}): part of the bucket would not be averaged",
                "DDP lays out gradients in a way that outlast does not know; average this model without compression",
            )
        end = offset + grad.numel() * size
    if end != buffer.numel() * size:
        raise CommError(
            f"the gradients of a bucket ({', '.join(names)}) take {end} bytes, the bucket has {buffer.numel() * size}: "
            "part of it would not be averaged",
            "DDP lays out gradients in a way that outlast does not know; average this model without compression",
        )


def _without_holes(x: Tensor) -> bool:
    """Whether the entries fill a run of memory, in whatever order."""
    return (
        x.is_contiguous()
        or 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) == x.numel()
    )
