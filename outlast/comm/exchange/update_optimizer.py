"""Which optimizers may apply an averaged update without being kept: the step is ``x -= lr * grad``.

What is averaged then is the direction in which Adam would go. An optimizer that takes it for a gradient, and adapts to
it or gives it a momentum once more, trains, and trains badly without a sign of it.
"""

from __future__ import annotations

from typing import Any

from torch.optim import SGD, Adam, Optimizer

from outlast.errors import CommError

_KEEP = "or keep any optimizer and set target = 'gradient'"


def refuse_other_than_sgd(optimizer: Any) -> None:
    """``optimizer`` is to apply an averaged update.

    A wrapper (``ZeroRedundancyOptimizer``, one of several optimizers) is judged by what it wraps, which makes steps of
    its own. Subclasses of SGD count as SGD.

    Raises:
        CommError: it is not plain SGD; says what it is, and what to make instead.
    """
    if isinstance(optimizer, SGD):
        momentum = max((float(group.get("momentum", 0.0)) for group in optimizer.param_groups), default=0.0)
        if momentum > 0:
            raise CommError(
                f"comm.target = 'update', but the optimizer is SGD with momentum = {momentum:g}, which would apply an "
                "averaged update several times over",
                "make it torch.optim.SGD without momentum; the reducer's own first moment is set by "
                "attach(..., direction=outlast.comm.direction.Adam(beta1=...)); " + _KEEP,
            )
        return
    if _wraps(optimizer):
        return
    groups = getattr(optimizer, "param_groups", None) or [{}]
    rate = groups[0].get("lr")
    lr = f"{float(rate):g}" if isinstance(rate, (int, float)) else "..."
    kind = type(optimizer).__name__
    raise CommError(
        f"comm.target = 'update', but the optimizer is {kind}: what is averaged is the direction in which Adam would "
        f"go, with Adam's moments in the reducer, and {kind} would take it for a gradient",
        (
            "keep it, and hand it to the reducer: attach(..., optimizer=optimizer); "
            if isinstance(optimizer, Adam)
            else ""
        )
        + f"make the optimizer torch.optim.SGD(parameters, lr={lr}, weight_decay=...), which goes in that direction as "
        "AdamW would (leave out clip_grad_norm_ with it: no gradient is left to clip); if it does nothing but "
        "x -= lr * grad, make it a subclass of SGD; " + _KEEP,
    )


def _wraps(optimizer: Any) -> bool:
    """Whether it holds optimizers, one or several."""
    for held in vars(optimizer).values():
        inner = held.values() if type(held) is dict else held if isinstance(held, (list, tuple)) else (held,)
        if any(isinstance(each, Optimizer) for each in inner):
            return True
    return False
