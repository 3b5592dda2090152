"""Logging of a rank: everything to its own file; rank 0's messages, and warnings, also to the terminal."""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
from pathlib import Path


def set_up_terminal(rank: int) -> None:
    """Messages of rank 0 to standard output, warnings of all ranks to standard error."""
    root = logging.getLogger("outlast")
    root.setLevel(logging.INFO)
    root.propagate = False
    if rank == 0:
        plain = logging.StreamHandler(sys.stdout)
        plain.addFilter(lambda record: record.levelno < logging.WARNING)
        root.addHandler(plain)
    loud = logging.StreamHandler(sys.stderr)
    loud.setLevel(logging.WARNING)
    loud.addFilter(lambda record: record.exc_info is None)  # main() prints the error; its traceback goes to the file
    loud.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(message)s"))
    root.addHandler(loud)


def set_up_file(path: Path, rank: int, *, stacks: bool) -> None:
    """Everything to ``path``; with ``stacks``, on SIGUSR1 also the stacks of all threads, even while the interpreter is
    stuck in C. (Without outlast's launcher, SIGUSR1 is a notice.)"""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d [rank {rank}] %(levelname)s %(name)s: %(message)s", "%F %T")
    )
    logging.getLogger("outlast").addHandler(handler)
    stream = handler.stream
    assert stream is not None  # a handler opens its file at once unless told to delay
    faulthandler.enable(file=stream, all_threads=True)
    if stacks:
        faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)


def shut_down() -> None:
    """Undo :func:`set_up_terminal` and :func:`set_up_file`."""
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.disable()
    root = logging.getLogger("outlast")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
