"""Which parameters took part in a backward pass, as DDP counts them where it looks for unused ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


class UsedParameters:
    """The parameters that got a gradient since they were last averaged, ``no_sync()`` included.

    DDP sends zeros for the others, and leaves ``.grad`` alone where no rank used a parameter. It counts them in a map
    that it reduces once the last bucket has gone, which is too late for error feedback: so this counts by itself.

    Args:
        params: whose gradients are watched.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._used: set[int] = set()
        self._handles = [
            param.register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]
            for param in params
            if param.requires_grad
        ]

    def take(self, params: Sequence[Tensor]) -> list[bool]:
        """For each parameter whether it was used; it counts as unused again from now on."""
        used = [id(param) in self._used for param in params]
        self._used.difference_update(id(param) for param in params)
        return used

    def close(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    def _mark(self, param: Tensor) -> None:
        self._used.add(id(param))
