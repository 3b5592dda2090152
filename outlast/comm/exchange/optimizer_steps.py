"""Whether an optimizer has used the gradients that were averaged: a step is what an optimizer's step ends.

Error feedback counts what it sends as applied, and trackers take what they get for the gradient of the whole step. So
two averages without an update in between would be wrong in silence: the second is of gradients that hold the first, or
the first was thrown away. That they follow one another is seen by the hooks that torch's optimizers have.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from outlast.comm.exchange import clipping
from outlast.comm.exchange.kept_optimizer import KeptOptimizer
from outlast.comm.exchange.update_optimizer import refuse_other_than_sgd
from outlast.errors import CommError

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_FRAMES = 20
"""How far up from an optimizer's step a GradScaler's is looked for; wrappers stand between."""


class OptimizerSteps:
    """The optimizer steps of one reducer's parameters.

    Loops whose update is not a ``torch.optim.Optimizer`` have none, and every average is taken for a step there.

    Args:
        scaled: called when a ``GradScaler`` steps an optimizer of these parameters, before it updates any; may raise.
        update: what is averaged is an update, which plain SGD alone may apply, or an optimizer that is kept.
    """

    def __init__(self, scaled: Callable[[GradScaler], None], *, update: bool) -> None:
        self._scaled = scaled
        self._update = update
        self._mine: set[int] = set()
        self.kept: KeptOptimizer | None = None
        """The user's own, which applies updates."""
        self._unused: dict[int, tuple[str, Tensor]] = {}
        """By id, the parameters whose average no optimizer has used yet, with their names."""
        self._held: set[int] = set()
        """Parameters that some optimizer has."""
        self._under_way: set[int] = set()
        """Those of optimizers whose step has begun and not ended: it runs, or has raised."""
        self._doubts = 0
        this = weakref.ref(self)
        self._handles = [
            register_optimizer_step_pre_hook(partial(_before, this)),
            register_optimizer_step_post_hook(partial(_after, this)),
        ]
        self._end = weakref.finalize(self, _remove, self._handles)
        if update:
            clipping.watch(self)

    def check(self, params: Iterable[tuple[str, Tensor]], remedy: str) -> None:
        """These are about to be averaged.

        Args:
            params: (name, parameter).
            remedy: what to do about what is wrong.

        Raises:
            CommError: some were averaged before, an optimizer has them, and it has not made a step since.
        """
        again = [(name, id(param)) for name, param in params if id(param) in self._unused]
        if not again:
            return
        if not all(key in self._held for _, key in again):
            self._look_for_optimizers()
        twice = [name for name, key in again if key in self._held]
        if twice:
            more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
            raise CommError(
                f"gradients of {twice[0]}{more} are averaged again, though no optimizer has made a step with the "
                "average from before: error feedback would count them twice",
                remedy,
            )

    def averaged(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """These are being averaged."""
        for name, param in params:
            self._mine.add(id(param))
            self._unused[id(param)] = name, param

    def update_in(self, grads: Iterable[Tensor | None]) -> str | None:
        """The name of a parameter whose average, not used yet, is among ``grads``; None if there is none."""
        given = {id(grad) for grad in grads}
        return next((name for name, param in self._unused.values() if id(param.grad) in given), None)

    def close(self) -> None:
        """Take the hooks away."""
        clipping.unwatch(self)
        self._end()

    def _look_for_optimizers(self) -> None:
        """One that was never stepped can only be found among all objects, which takes a moment: so at the first doubt,
        the second, the fourth, ..."""
        self._doubts += 1
        if self._doubts & (self._doubts - 1):
            return
        for each in gc.get_objects():
            if issubclass(type(each), Optimizer):
                self._held |= _params(each) & self._mine

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
        params = _params(optimizer)
        if params & self._mine:
            if self._update:
                if self.kept is not None and optimizer is self.kept.optimizer:
                    self.kept.before_step()
                else:
                    refuse_other_than_sgd(optimizer)
            scaler = _scaler_on_stack()
            if scaler is not None:
                self._scaled(scaler)
        self._held |= params & self._mine
        # Some optimizers use what was averaged before, and then call their closure. But the step before this one may
        # have raised, and used nothing.
        calls = 0 if params & self._under_way else 1

        def called() -> None:
            nonlocal calls
            if calls:
                self._use(params)
            calls += 1

        told = _with_closures(args, kwargs, called, f"_outlast_steps_{id(self)}")
        self._under_way |= params
        return told

    def _after(self, optimizer: Optimizer) -> None:
        # Only now: a step that raises has used nothing.
        params = _params(optimizer)
        self._under_way -= params
        self._use(params)

    def _use(self, params: set[int]) -> None:
        self._held |= params & self._mine
        for key in params:
            self._unused.pop(key, None)


def live_scaler() -> GradScaler | None:
    """The scaler of this process that multiplies losses by most, if there is one that has multiplied any.

    Looks at all objects, so only for an error.
    """
    scalers: list[GradScaler] = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), GradScaler) and each.is_enabled() and getattr(each, "_scale", None) is not None
    ]
    return max(scalers, key=lambda each: each.get_scale(), default=None)


def _scaler_on_stack() -> GradScaler | None:
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame.f_code.co_filename.endswith("grad_scaler.py"):
            owner = frame.f_locals.get("self")
            if isinstance(owner, GradScaler) and owner.is_enabled():
                return owner
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def _params(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", None)  # a wrapper may not have been given its own yet
    return {id(param) for group in groups or () for param in group.get("params", ())}


def _with_closures(
    args: tuple[Any, ...], kwargs: dict[str, Any], called: Callable[[], None], mark: str
) -> _Arguments | None:
    """Arguments of a step with closures that tell when they are called; None: it has none.

    An optimizer that calls its closure again has used what the closure averaged before. The mark, an attribute, is on
    closures that tell already: the step of a subclass hands them to that of its base class.
    """

    def telling(closure: Any) -> Any:
        if not callable(closure) or isinstance(closure, Optimizer) or hasattr(closure, mark):
            return closure

        @functools.wraps(closure)
        def told(*args: Any, **kwargs: Any) -> Any:
            called()
            return closure(*args, **kwargs)

        setattr(told, mark, True)
        return told

    if not any(map(callable, (*args[1:], *kwargs.values()))):
        return None
    return tuple(map(telling, args)), {name: telling(value) for name, value in kwargs.items()}


def _before(
    this: weakref.ref[OptimizerSteps], optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Arguments | None:
    steps = this()
    return steps._before(optimizer, args, kwargs) if steps is not None else None


def _after(this: weakref.ref[OptimizerSteps], optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    steps = this()
    if steps is not None:
        steps._after(optimizer)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
