"""What a process may run out of in the middle of a save: memory, address space, threads.

That is the environment's doing, like a full disk, and fails a save as an :class:`OSError` does; training goes on.
"""

from __future__ import annotations

import threading

_SIGNS = (
    "can't start new thread",  # Python
    "can't allocate memory",  # PyTorch, on the CPU
    "not enough memory",  # PyTorch, on other systems
    "out of memory",  # CUDA
    "std::bad_alloc",
    "resource temporarily unavailable",  # std::thread
)
_HINT = "raise the limits of this process (ulimit -u, ulimit -v, pids.max and memory.max of its cgroup), or use less"


class Shortage(OSError):
    """There is no more of something that the operating system gives out."""


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        Shortage: there can be no more threads.
    """
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        found = as_os_error(error)
        if found is None:
            raise
        raise found from error


def as_os_error(error: BaseException) -> OSError | None:
    """The error if it is the operating system's, or what it means if memory or threads have run out; else None."""
    if isinstance(error, OSError):
        return error
    text = str(error)
    if isinstance(error, MemoryError):
        return Shortage(f"this process gets no more memory ({text or 'MemoryError'}); {_HINT}")
    if isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _SIGNS):
        return Shortage(f"{text.splitlines()[0]}; {_HINT}")
    return None
