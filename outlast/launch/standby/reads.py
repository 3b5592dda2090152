"""Which environment variables are read while packages are imported.

A standby is started with the environment of a rank of now and becomes one of a later start, in which some variables
have other values: the port, and perhaps the rank. That is right only if nothing has read them before.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator

_read: set[str] = set()
_copied: deque[str] = deque()
"""Keys that an iteration has given, and whose values have not been asked for yet."""


class _Recording(os._Environ[str]):
    """``os.environ`` that writes down each variable that is asked for by its name.

    A copy of all of them does not count: it is made to be passed on, or looked through for a few.
    """

    def __iter__(self) -> Iterator[str]:
        keys = list(super().__iter__())
        _copied.clear()
        _copied.extend(keys)
        return iter(keys)

    def __getitem__(self, key: str) -> str:
        if _copied and _copied[0] == key:
            _copied.popleft()
        else:
            _copied.clear()
            _read.add(key)
        return super().__getitem__(key)


def begin() -> None:
    """Write down what is read from now on."""
    os.environ.__class__ = _Recording


def end() -> set[str]:
    """Stop; returns the names that were read."""
    os.environ.__class__ = os._Environ
    return set(_read)
