"""What is still open when the interpreter exits is told so, while threads and storage clients still work.

``atexit`` would be too late for that: :mod:`concurrent.futures`, on which storage clients rely, refuses work as soon as
the main thread has ended, which is before. So this asks :mod:`threading` to be called at that time, as
:mod:`concurrent.futures` itself does. What cannot be ended then, because a thread that the interpreter waits for still
uses it, or because there is no such way to be called, is told by ``atexit``.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import sys
import threading
import time
from typing import Protocol

_log = logging.getLogger("outlast.checkpoint")
_open: dict[int, Unclosed] = {}
_lock = threading.Lock()
_state = {"registered": False, "exiting": False, "failed": False}
_began_s = {"waiting": 0.0}


class Unclosed(Protocol):
    """What has something to do at the interpreter's exit."""

    pid: int
    """Of the process that opened it: a fork has the object, but none of its threads."""

    @property
    def in_use(self) -> bool:
        """Whether a thread that the interpreter waits for may still use it."""

    def end_at_exit(self) -> None:
        """Called once, in the main thread."""


def add(one: Unclosed) -> None:
    """Have it told of the exit, unless it is removed before."""
    with _lock:
        _open[id(one)] = one
        if _state["registered"]:
            return
        _state["registered"] = True
    atexit.register(_end_all)
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        try:
            register(_begin_exit)
        except RuntimeError:  # the main thread has ended already
            _state["exiting"] = True


def remove(one: Unclosed) -> None:
    """It has nothing to do any more."""
    with _lock:
        _open.pop(id(one), None)


def exiting() -> bool:
    """Whether the main thread has ended. Threads that the interpreter waits for may go on."""
    return _state["exiting"]


def by_exception() -> bool:
    """Whether the interpreter exits because of an exception that nobody caught. (It tells of no ``sys.exit``.)"""
    return getattr(sys, "last_value", None) is not None


def left_s(limit_s: float) -> float:
    """What is left of a time that the exit may take: it is one for all that are told of it, not one for each."""
    return max(0.0, _began_s["waiting"] + limit_s - time.monotonic())


def end_with_failure() -> None:
    """Have the process end with status 1, once all else is done.

    An exception at the interpreter's exit changes no status. So the C library is asked to end the process with another
    one, after the interpreter is gone: all callbacks have run by then, and all files are flushed.
    """
    if _state["failed"]:
        return
    _state["failed"] = True
    library = ctypes.CDLL(None)
    # Called in reverse order; what C libraries registered before is skipped.
    library.__cxa_atexit(library._exit, ctypes.c_void_p(1), None)
    library.__cxa_atexit(library.fflush, None, None)


def _begin_exit() -> None:
    _state["exiting"] = True
    _end_all(unused_only=True)


def _end_all(*, unused_only: bool = False) -> None:
    _began_s["waiting"] = time.monotonic()
    for one in list(_open.values()):
        if one.pid == os.getpid() and not (unused_only and one.in_use):
            remove(one)
            try:
                one.end_at_exit()
            except Exception:  # the others have their turn all the same, and a traceback is all that is left to give
                _log.exception("a Checkpointer could not be ended at the interpreter's exit")
