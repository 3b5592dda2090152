"""Which tensors can be read as bytes: those with memory of their own, all of which is there.

An address is read only after the storage behind it was asked for its size: of a fake tensor, a wrapper around other
tensors, or a parameter whose storage was freed (as FSDP does between uses), the address is 0 or means nothing.
"""

from __future__ import annotations

import torch

from outlast.checkpoint.format.dtypes import check_storable
from outlast.errors import CheckpointError

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def as_plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The same elements as a plain, detached ``torch.Tensor``, which shares memory and ``_version``.

    Args:
        tensor: of any class.
        name: for errors.

    Raises:
        CheckpointError: its elements are not in memory of its own, or cannot be stored; says what it is.
    """
    kind = type(tensor)
    if kind not in _PLAIN:
        if torch.nn.parameter.is_lazy(tensor):
            raise CheckpointError(
                f"the tensor {name!r} is a parameter or buffer without a shape yet",
                "run one forward pass of the lazy module before its state is saved or restored",
            )
        if hasattr(tensor, "full_tensor"):
            raise CheckpointError(
                f"the tensor {name!r} is a DTensor, which spans all ranks",
                "put it into replicated, or its to_local() into local",
            )
        if _dispatches(kind):
            raise CheckpointError(
                f"the tensor {name!r} is a {kind.__module__}.{kind.__qualname__}, which has no memory of its own",
                "store the plain tensors it consists of",
            )
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(torch.Tensor)
    _check_kind(tensor, name)
    check_storable(tensor, name)
    _check_memory(tensor, name)
    return tensor.detach()


def address_of_storage(tensor: torch.Tensor) -> int:
    """Where its storage begins, to tell which tensors share one; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _dispatches(kind: type) -> bool:
    """Whether a class of tensors answers operations itself, so that its elements are wherever it likes."""
    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]


def _check_kind(tensor: torch.Tensor, name: str) -> None:
    what = fix = ""
    if torch._is_functional_tensor(tensor):
        what, fix = "is a functional tensor, whose elements are pending", "save outside of functionalization"
    elif torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        what, fix = "belongs to a transformation of torch.func", "save outside of vmap, grad and functionalize"
    elif tensor.is_nested:
        what, fix = "is a nested tensor", "store its values() and offsets()"
    elif tensor._is_zerotensor():
        what, fix = "is a zero without memory, as forward-mode differentiation makes it", "store its clone()"
    if what:
        raise CheckpointError(f"the tensor {name!r} {what}", fix)


def _check_memory(tensor: torch.Tensor, name: str) -> None:
    """Raise :class:`CheckpointError` unless every element lies within the tensor's storage."""
    if not tensor.numel():
        return
    try:
        storage = tensor.untyped_storage()
        address, have_bytes = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"the tensor {name!r} has no storage that can be read: {error}", "store a tensor with memory of its own"
        ) from error
    last = int(tensor.storage_offset()) + tensor.numel() - 1
    if not tensor.is_contiguous():
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        last = int(tensor.storage_offset()) + sum((size - 1) * stride for size, stride in pairs)
    need_bytes = (last + 1) * tensor.itemsize
    if not address or need_bytes > have_bytes:
        raise CheckpointError(
            f"the tensor {name!r} {tuple(tensor.shape)} needs {need_bytes} bytes of its storage, which has "
            f"{have_bytes if address else 0}",
            "it was freed or made smaller (FSDP does so between uses); save and restore while its memory is there, "
            "or pass state_dict() as the wrapper gives it",
        )
