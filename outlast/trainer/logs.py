"""Logging of a rank: everything to its own file; rank 0's messages, and warnings, also to the terminal."""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
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
    try:
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        logging.getLogger("outlast").warning("%s: there is no log, training goes on: %s", path, error.strerror)
        return
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s.%(msecs)03d [rank {rank}] %(levelname)s %(name)s: %(message)s", "%F %T")
    )
    logging.getLogger("outlast").addHandler(handler)
    stream = handler.stream
    assert stream is not None  # a handler opens its file at once unless told to delay
    faulthandler.enable(file=stream, all_threads=True)
    if stacks:
        faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)


class _LogFile(logging.FileHandler):
    """A file that ends nothing: what a full disk refuses is counted, and told once, and again when there is room."""

    _lost = 0
    _telling = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it."""
        if self._telling:
            return
        stream = self.stream
        assert stream is not None
        try:
            text = self.format(record) + self.terminator
            if self._lost:
                text = f"({self._lost} lines before this one could not be written)\n{text}"
            # Without a buffer, in which what was refused would stay, and be refused again.
            data = text.encode("utf-8", errors="backslashreplace")
            written = os.write(stream.fileno(), data)
            if written < len(data):
                os.ftruncate(stream.fileno(), os.fstat(stream.fileno()).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._lost = 0
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                self._tell(error)

    def _tell(self, error: OSError) -> None:
        """On the terminal alone."""
        self._telling = True
        try:
            logging.getLogger("outlast").warning(
                "%s: lines of the log are being lost, training goes on: %s", self.baseFilename, error.strerror
            )
        finally:
            self._telling = False


def shut_down() -> None:
    """Undo :func:`set_up_terminal` and :func:`set_up_file`."""
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.disable()
    root = logging.getLogger("outlast")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
