"""The number of a step, from any kind of integer."""

from __future__ import annotations

import operator
from typing import Any

from outlast.errors import CheckpointError


def as_step(value: Any, where: str, expected: str = "an integer") -> int:
    """The step as Python's integer: numpy's and torch's integers are taken, too.

    Args:
        value: the argument.
        where: the name of the function that got it.
        expected: what it takes, in words.

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
        raise CheckpointError(f"{where}: a step is {expected} >= 0, got {what}", "pass the number of the step")
    return step
