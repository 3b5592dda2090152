"""The number of a step, from any kind of integer."""

from __future__ import annotations

import operator
from typing import Any

from outlast.errors import CheckpointError


def as_step(value: Any, where: str, instead: str | None = None) -> int:
    """The step as Python's integer: numpy's and torch's integers are taken, too.

    Args:
        value: the argument.
        where: the name of the function that got it.
        instead: a word that it takes instead of a number.

    Raises:
        CheckpointError: it is a truth value, not an integer, or negative.
    """
    try:
        # True would be step 1.
        step = None if "bool" in str(getattr(value, "dtype", type(value).__name__)) else operator.index(value)
    except TypeError:
        step = None
    if step is None or step < 0:
        what = f"{value!r} ({type(value).__name__})" if step is None else str(step)
        fix = "pass the number of the step" + (f', or "{instead}"' if instead else "")
        raise CheckpointError(f"{where}: a step is an integer >= 0, got {what}", fix)
    return step
